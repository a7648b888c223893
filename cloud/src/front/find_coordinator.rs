//! FindCoordinator.
