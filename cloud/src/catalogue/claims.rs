//! Which topics' names are being changed: by one at a time, and how much they will come to.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use shared::name::TopicName;
use tokio::sync::Notify;

/// Names that are being changed.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Held>,
    freed: Notify,
}

/// What is claimed at one moment.
#[derive(Debug, Default)]
pub struct Held {
    names: BTreeMap<TopicName, (usize, usize)>,
    /// Topics and partitions that come with them.
    pub coming: (usize, usize),
}

impl Held {
    /// Whether somebody changes it.
    pub fn contains(&self, name: &TopicName) -> bool {
        self.names.contains_key(name)
    }

    /// Counts partitions that come with a name that is claimed.
    pub fn reserve(&mut self, name: &TopicName, partitions: usize) {
        if let Some(claimed) = self.names.get_mut(name) {
            claimed.1 += partitions;
            self.coming.1 += partitions;
        }
    }
}

/// The right to change a name, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    claims: Arc<Claims>,
    name: TopicName,
}

impl Claims {
    /// Looks, and claims, in one step.
    pub fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }

    /// Claims a name that nobody holds, with the topics and partitions that will come of it.
    pub fn claim_in(self: &Arc<Self>, held: &mut Held, name: TopicName, coming: (usize, usize)) -> Claim {
        held.coming.0 += coming.0;
        held.coming.1 += coming.1;
        held.names.insert(name.clone(), coming);
        Claim { claims: self.clone(), name }
    }

    /// Waits until nobody changes the name, and claims it.
    pub async fn claim(self: &Arc<Self>, name: &TopicName) -> Claim {
        loop {
            // Registered first, then looked: nothing is missed in between.
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            {
                let mut held = self.lock();
                if !held.contains(name) {
                    return self.claim_in(&mut held, name.clone(), (0, 0));
                }
            }
            freed.await;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        let gone = held.names.remove(&self.name).unwrap_or_default();
        held.coming.0 -= gone.0;
        held.coming.1 -= gone.1;
        drop(held);
        self.claims.freed.notify_waiters();
    }
}
