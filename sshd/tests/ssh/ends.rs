//! How sessions, machines and the service end.
