//! What one client may take.
