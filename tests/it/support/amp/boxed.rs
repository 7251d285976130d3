//! An optimizer of a type that only its maker knows, for what takes one by value.

use kitsune::optim::{Optimizer, OptimizerId, Parameter, StepInputs};
use kitsune::{Result, Tensor};

pub struct Boxed(pub Box<dyn Optimizer>);

impl Optimizer for Boxed {
    fn id(&self) -> &OptimizerId {
        self.0.id()
    }
    fn parameters(&self) -> &[Parameter] {
        self.0.parameters()
    }
    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        self.0.step(inputs)
    }
    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        self.0.state(index)
    }
    fn groups(&self) -> Vec<std::ops::Range<usize>> {
        self.0.groups()
    }
    fn settings(&self, group: usize) -> Vec<(&'static str, f64)> {
        self.0.settings(group)
    }
    fn set_settings(&mut self, group: usize, changes: &[(&str, f64)]) -> Result<()> {
        self.0.set_settings(group, changes)
    }
}
