//! The admin port: liveness, readiness, status and metrics.
