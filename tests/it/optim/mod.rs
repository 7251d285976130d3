//! Optimizers against their formulas.

mod adam;
mod adamw;
mod sgd;
mod state;
