//! File descriptors: as many as the system allows, and shared out so that no door takes what another, or the disk, needs.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shared::door::LEAVING_MAX;

/// Raises the limit on open files to the most the system allows this process, and returns what it is then. A system that refuses
/// leaves it as it was: fewer connections are no reason not to start.
pub fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "the limit on open files stays as it is");
        }
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many connections one kind of listener may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorShare {
    /// The setting's key.
    pub key: &'static str,
    /// What the settings say.
    pub wanted: usize,
    /// What the descriptors allow.
    pub granted: usize,
}

/// Shares `limit` descriptors out: `files` are kept for what is no connection, the doors that are `reserved` get what they want, the
/// others what is left, each its part of what all want. Nobody gets more than it wants, nor less than [`DOOR_MIN`].
pub fn share(
    limit: u64,
    files: usize,
    reserved: &[(&'static str, usize)],
    doors: &[(&'static str, usize)],
) -> Vec<DoorShare> {
    // A door holds some connections that are being closed beyond its bound.
    let leaving = (reserved.len() + doors.len()) * LEAVING_MAX;
    let kept = files + leaving + reserved.iter().map(|(_, wanted)| wanted).sum::<usize>();
    let free = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(kept);
    let wanted: u128 = doors.iter().map(|(_, wanted)| *wanted as u128).sum();
    let part = |wanted_here: usize| match wanted {
        ..=0 => 0,
        all if all <= free as u128 => wanted_here,
        all => (free as u128 * wanted_here as u128 / all) as usize,
    };
    let whole = reserved.iter().map(|(key, wanted)| DoorShare { key, wanted: *wanted, granted: *wanted });
    let parts = doors.iter().map(|(key, wanted)| {
        let granted = part(*wanted).max(DOOR_MIN).min(*wanted);
        DoorShare { key, wanted: *wanted, granted }
    });
    whole.chain(parts).collect()
}

/// Least connections of a door, whatever the limit is.
pub const DOOR_MIN: usize = 16;

impl DoorShare {
    /// What a person should know about it, if there is something.
    pub fn warning(&self, limit: u64) -> Option<String> {
        (self.granted < self.wanted).then(|| {
            format!(
                "{} = {}: lowered to {}, for this process may open {limit} files and keeps some for its data; raise the \
                 hard limit (ulimit -Hn, or LimitNOFILE= of the unit) to have more",
                self.key, self.wanted, self.granted
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_get_what_they_want_or_their_part_of_what_there_is() {
        let doors = [("kafka.connections_max", 10_000), ("link.connections_max", 30_000)];
        let granted = |limit| {
            let shares = share(limit, 256, &[("admin.connections_max", 64)], &doors);
            shares.iter().map(|share| share.granted).collect::<Vec<_>>()
        };
        assert_eq!(granted(u64::MAX), [64, 10_000, 30_000]);
        assert_eq!(granted(1 << 20), [64, 10_000, 30_000]);
        let few = granted(1024);
        assert_eq!(few, [64, 164, 492]);
        assert!(few.iter().sum::<usize>() + 3 * LEAVING_MAX + 256 <= 1024);
        assert_eq!(granted(64), [64, DOOR_MIN, DOOR_MIN]);
        let lowered = &share(1024, 256, &[], &doors)[0];
        assert!(lowered.warning(1024).unwrap().contains("kafka.connections_max = 10000: lowered to"));
        assert_eq!(share(1 << 20, 256, &[], &doors)[0].warning(1 << 20), None);
    }

    #[test]
    fn the_limit_is_raised_to_what_is_allowed() {
        let limit = raise();
        assert_eq!(Some(limit), getrlimit(Resource::Nofile).maximum.or(Some(u64::MAX)));
    }
}
