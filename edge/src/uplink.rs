//! The link's edge half over HTTPS.
