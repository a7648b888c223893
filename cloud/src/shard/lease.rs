//! Acknowledging only while this node knows that the log is its own: asked for by a setting, and off without it.

use std::sync::Arc;
use std::time::Duration;

use shared::log::AppendError;

use super::Core;
use super::flight::Admitted;
use crate::archive::Confirmation;

/// How old the last confirmation may be.
#[derive(Debug)]
pub struct Lease {
    confirmation: Arc<Confirmation>,
    age_max: Duration,
}

impl Lease {
    fn check(&self, stored: bool) -> Result<(), AppendError> {
        match self.confirmation.age() {
            Some(age) if age <= self.age_max => Ok(()),
            age => Err(AppendError::Unconfirmed { secs: age.unwrap_or(self.age_max).as_secs(), stored }),
        }
    }
}

impl Core {
    /// From now on nothing is acknowledged while the last confirmation is older than `age_max`.
    pub fn set_lease(&self, confirmation: Arc<Confirmation>, age_max: Duration) {
        // The first one counts.
        let _ = self.lease.set(Lease { confirmation, age_max });
    }

    /// Whether something may be taken, or acknowledged that is `stored`.
    pub fn check_lease(&self, stored: bool) -> Result<(), AppendError> {
        self.lease.get().map_or(Ok(()), |lease| lease.check(stored))
    }

    /// Waits for what was admitted, and answers if this node still knows then that the log is its own.
    pub async fn acknowledged<T>(self: Arc<Self>, admitted: Admitted<T>) -> Result<T, AppendError> {
        let answer = admitted.resolve().await?;
        self.check_lease(true)?;
        Ok(answer)
    }
}
