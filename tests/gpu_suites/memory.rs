//! The suites of the pool that look at contents, edges and faults. The others count what the host device does.

#[path = "../it/memory/contents.rs"]
mod contents;
#[path = "../it/memory/edges.rs"]
mod edges;
#[path = "../it/memory/faults.rs"]
mod faults;
#[path = "../it/memory/model.rs"]
mod model;
