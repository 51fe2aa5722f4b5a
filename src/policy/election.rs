//! Who may lead.
