//! The front over real sockets, a log in memory and the codec from the client's side.
