//! Membership: workers that attach, load and form a group.
