//! The host device and the contract of `trait Driver`.

mod capture;
mod fault;
mod host;
mod mapping_limit;
mod prefault;
mod seeded;
mod virtual_memory;
