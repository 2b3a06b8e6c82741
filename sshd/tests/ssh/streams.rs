//! What goes through a session comes out as it went in, in order, and whole.
