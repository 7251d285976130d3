//! Groups of parameters that share settings.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::launch::update_pass::{GroupSettings, SETTING_WORDS};
use crate::memory;
use crate::optim::Parameter;
use crate::optim::optimizer::no_group;
use crate::optim::rows::{Needs, Rows};
use crate::optim::settings::{Precision, Settings, of_group, with_numbers};
use crate::storage::{Context, Tensor};

/// Parameters that share settings. An optimizer takes several groups and moves all of them in the same launches.
#[derive(Clone, Debug)]
pub struct ParamGroup<C> {
    /// The parameters, in the order in which the optimizer numbers them.
    pub parameters: Vec<Parameter>,
    /// Their settings.
    pub config: C,
}

impl<C> ParamGroup<C> {
    /// `parameters` with the settings `config`.
    #[must_use]
    pub fn new(parameters: Vec<Parameter>, config: C) -> Self {
        Self { parameters, config }
    }
}

/// The settings of all groups, on the host and on the device.
///
/// Kernels read them from device memory at a fixed address, so graphs captured before a change see it. A change is
/// enqueued on the optimizer's stream at once.
#[derive(Debug)]
pub(super) struct Groups<S> {
    context: Context,
    settings: Vec<S>,
    /// The settings the optimizer was made with, which determine the state it keeps.
    made_with: Vec<S>,
    ranges: Vec<Range<usize>>,
    precisions: Vec<Precision>,
    /// f64, a row per group.
    rows: Tensor,
    /// u32, the group of each parameter.
    of: Tensor,
}

/// Groups taken apart: all parameters with their needs, and the groups' ranges and valid settings.
pub(super) type Apart<S> = (Vec<(Parameter, Needs)>, Vec<Range<usize>>, Vec<S>);

/// Refuses settings that are invalid for a group computed in `precision`.
fn check<S: Settings>(group: usize, settings: &S, precision: Precision) -> Result<()> {
    of_group(group, settings.validate())?;
    of_group(group, settings.validate_in(precision))
}

/// Checks the settings of `groups` and takes the groups apart; see [`Apart`].
pub(super) fn take_apart<S: Settings>(groups: Vec<ParamGroup<S>>) -> Result<Apart<S>> {
    let (mut parameters, mut ranges, mut settings) = (Vec::new(), Vec::new(), Vec::new());
    for (number, group) in groups.into_iter().enumerate() {
        check(number, &group.config, Precision::of(&group.parameters))?;
        let (needs, start) = (group.config.needs(), parameters.len());
        parameters.extend(group.parameters.into_iter().map(|one| (one, needs)));
        ranges.push(start..parameters.len());
        settings.push(group.config);
    }
    Ok((parameters, ranges, settings))
}

impl<S: Settings> Groups<S> {
    pub(super) fn new(rows: &Rows, ranges: Vec<Range<usize>>, settings: Vec<S>) -> Result<Self> {
        let (context, parameters) = (rows.context(), &rows.parameters);
        let precisions = ranges.iter().cloned();
        let precisions = precisions.map(|range| Precision::of(&parameters[range]));
        let _tag = memory::tag("optimizer");
        let numbers = (0u32..).zip(&ranges);
        let of: Vec<u32> = numbers
            .flat_map(|(number, range)| range.clone().map(move |_| number))
            .collect();
        let rows = [settings.len(), SETTING_WORDS];
        Ok(Self {
            context: context.clone(),
            rows: Tensor::from_slice(context, rows, bits_as_f64(&words(&settings)))?,
            of: Tensor::from_slice(context, [of.len()], &of)?,
            made_with: settings.clone(),
            precisions: precisions.collect(),
            settings,
            ranges,
        })
    }

    pub(super) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// The settings of the first group. There is one, because there are parameters.
    pub(super) fn first(&self) -> &S {
        &self.settings[0]
    }

    pub(super) fn get(&self, group: usize) -> Option<&S> {
        self.settings.get(group)
    }

    /// The settings as operands of a kernel.
    pub(super) fn on_device(&self) -> Result<GroupSettings> {
        Ok(GroupSettings {
            rows: self.rows.span()?,
            groups: self.of.span()?,
        })
    }

    /// Changes numbers of one group by name: all of them or none.
    pub(super) fn set_numbers(&mut self, group: usize, changes: &[(&str, f64)]) -> Result<()> {
        self.expect(group)?;
        let changed = of_group(group, with_numbers(&self.settings[group], changes))?;
        self.set(group, changed)
    }

    /// Replaces the settings of one group.
    pub(super) fn set(&mut self, group: usize, settings: S) -> Result<()> {
        self.expect(group)?;
        self.check(group, &settings)?;
        let words = settings.words();
        if words != self.settings[group].words() {
            self.expect_no_capture()?;
            let row = self.rows.narrow(0, group, 1)?;
            row.copy_from_slice(bits_as_f64(&words))?;
        }
        self.settings[group] = settings;
        Ok(())
    }

    /// Changes one number in every group, or in none.
    pub(super) fn set_everywhere(&mut self, name: &str, value: f64) -> Result<()> {
        let changes = [(name, value)];
        let settings = self.settings.iter().enumerate();
        let changed = settings.map(|(group, old)| of_group(group, with_numbers(old, &changes)));
        let changed: Vec<S> = changed.collect::<Result<_>>()?;
        for (group, settings) in changed.iter().enumerate() {
            self.check(group, settings)?;
        }
        let words = words(&changed);
        if words != self::words(&self.settings) {
            self.expect_no_capture()?;
            self.rows.copy_from_slice(bits_as_f64(&words))?;
        }
        self.settings = changed;
        Ok(())
    }

    /// The flags of one group; `parameters` are those of all groups.
    pub(super) fn flags(
        &self,
        group: usize,
        parameters: &[Parameter],
    ) -> Vec<(&'static str, String)> {
        match (self.settings.get(group), self.ranges.get(group)) {
            (Some(settings), Some(range)) => settings.flags(&parameters[range.clone()]),
            _ => Vec::new(),
        }
    }

    /// Refuses settings that are invalid for a group, or need other state than it has.
    fn check(&self, group: usize, settings: &S) -> Result<()> {
        check(group, settings, self.precisions[group])?;
        of_group(group, self.made_with[group].allows(settings))
    }

    fn expect_no_capture(&self) -> Result<()> {
        let stream = self.context.stream();
        // A captured copy would restore these settings at every launch of the graph.
        if stream.driver().is_capturing(stream.raw())? {
            return Err(Error::Capturing {
                call: "set_settings",
            });
        }
        Ok(())
    }

    fn expect(&self, group: usize) -> Result<()> {
        let groups = self.settings.len();
        if group < groups {
            return Ok(());
        }
        Err(no_group(group, groups))
    }
}

/// The rows of all groups.
fn words<S: Settings>(settings: &[S]) -> Vec<u64> {
    settings.iter().flat_map(Settings::words).collect()
}

/// Reinterprets words as f64, the 64-bit element type of tensors. Only the bits matter.
fn bits_as_f64(words: &[u64]) -> &[f64] {
    bytemuck::cast_slice(words)
}
