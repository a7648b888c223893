//! What may be deleted when, and what happens when nothing may.
