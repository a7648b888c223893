//! The edge's answer to what the MQTT front asks of a store.
