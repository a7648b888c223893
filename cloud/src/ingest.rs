//! The link's cloud half over HTTPS.
