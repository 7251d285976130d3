//! Matches a saved state with an optimizer: which saved group each parameter was in, and what does not fit.
//!
//! Parameters are found by name. A parameter brings the settings of the group it was saved in, so groups may be
//! reordered, split or joined, as long as all parameters of a group here were saved with the same settings.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::{Error, NAMES_TOLD, Result};
use crate::optim::GroupState;
use crate::optim::rule::Told;

/// Parts that do not fit, by name and reason.
#[derive(Debug, Default)]
pub(super) struct Misfits(Vec<(String, String)>);

impl Misfits {
    pub(super) fn add(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.0.push((name.into(), reason.into()));
    }

    /// Returns an error if there are any: it names the first with its reason, then the others.
    pub(super) fn refuse(self) -> Result<()> {
        let mut misfits = self.0.into_iter();
        let Some((name, mut reason)) = misfits.next() else {
            return Ok(());
        };
        let others = misfits.len();
        for (name, why) in misfits.by_ref().take(NAMES_TOLD - 1) {
            reason += &format!("; `{name}`: {why}");
        }
        if others >= NAMES_TOLD {
            reason += &format!("; and {} more", others + 1 - NAMES_TOLD);
        }
        Err(Error::state(name, reason))
    }
}

/// The groups of an optimizer and the saved ones.
pub(super) struct Matched<'a> {
    here: &'a [GroupState],
    saved: &'a [GroupState],
    /// The saved group of each saved parameter.
    homes: HashMap<&'a str, usize>,
}

impl<'a> Matched<'a> {
    /// # Errors
    /// [`Error::InvalidState`] for a name that appears twice on one side.
    pub(super) fn new(here: &'a [GroupState], saved: &'a [GroupState]) -> Result<Self> {
        homes(here, "the name appears twice here")?;
        Ok(Self {
            here,
            saved,
            homes: homes(saved, "the name appears twice in the saved state")?,
        })
    }

    /// Whether both sides have the same parameters.
    pub(super) fn is_whole(&self) -> bool {
        let mut here = self.here.iter().flat_map(|group| &group.parameters);
        here.clone().count() == self.homes.len()
            && here.all(|name| self.homes.contains_key(name.as_str()))
    }

    /// For each group here, the indices of the saved groups that its parameters were in.
    pub(super) fn sources(&self) -> Vec<Vec<usize>> {
        let sources = self.here.iter().map(|group| {
            let homes = group.parameters.iter();
            let mut homes: Vec<_> = homes
                .filter_map(|name| self.homes.get(name.as_str()).copied())
                .collect();
            homes.sort_unstable();
            homes.dedup();
            homes
        });
        sources.collect()
    }

    /// Parameters that only one side has, and for each other parameter the first of its misfits in `tensors`.
    pub(super) fn misfits(&self, tensors: Misfits) -> Misfits {
        let names = |groups: &'a [GroupState]| groups.iter().flat_map(|group| &group.parameters);
        let here: HashSet<&str> = names(self.here).map(String::as_str).collect();
        let mut told: HashSet<String> = HashSet::new();
        let mut misfits = Misfits::default();
        for name in names(self.here).filter(|name| !self.homes.contains_key(name.as_str())) {
            misfits.add(name, "the saved state has no such parameter");
            told.insert(name.clone());
        }
        let extra: Vec<_> = names(self.saved)
            .filter(|name| !here.contains(name.as_str()))
            .collect();
        told.extend(extra.iter().map(|name| (*name).clone()));
        for (tensor, reason) in tensors.0 {
            let parameter = tensor
                .rsplit_once('/')
                .map_or("", |(parameter, _)| parameter);
            if told.insert(parameter.to_owned()) {
                misfits.add(tensor, reason);
            }
        }
        for name in extra {
            misfits.add(name, "was saved, but there is no such parameter here");
        }
        misfits
    }

    /// Refuses groups with other flags than their parameters were saved with. Flags that only one side has are not
    /// compared, because some flags apply to some parameters only.
    pub(super) fn check_flags(&self, rule: &str) -> Result<()> {
        for (number, sources) in self.sources().into_iter().enumerate() {
            let here = &self.here[number].flags;
            for source in sources {
                let saved = &self.saved[source].flags;
                let differing: Vec<_> = here
                    .iter()
                    .filter_map(|(name, value)| Some((name.as_str(), value, saved.get(name)?)))
                    .filter(|(_, value, saved)| value != saved)
                    .collect();
                let Some((key, ..)) = differing.first() else {
                    continue;
                };
                let mut told = [Vec::new(), Vec::new()];
                for (name, value, saved) in &differing {
                    told[0].push((*name, saved.as_str()));
                    told[1].push((*name, value.as_str()));
                }
                let [saved, here] = told.map(|flags| Told { rule, flags });
                let reason = format!("group {number}: saved from {saved}; this is {here}");
                return Err(Error::state(*key, reason));
            }
        }
        Ok(())
    }

    /// The saved settings for each group, except those named in `kept`.
    pub(super) fn settings(&self, kept: &[&str]) -> Result<Vec<BTreeMap<String, f64>>> {
        let sources = self.sources().into_iter().enumerate();
        let settings = sources.map(|(number, sources)| {
            let Some(first) = sources.first() else {
                return Ok(BTreeMap::new());
            };
            let mut settings = self.saved[*first].settings.clone();
            settings.retain(|name, _| !kept.contains(&name.as_str()));
            self.check_agreement(number, &sources, &settings)?;
            Ok(settings)
        });
        settings.collect()
    }

    /// Refuses saved settings whose names differ from those here, or whose values are not finite.
    pub(super) fn check_settings(&self, kept: &[&str]) -> Result<()> {
        for (number, sources) in self.sources().into_iter().enumerate() {
            for source in sources {
                self.check_settings_of(number, source, kept)?;
            }
        }
        Ok(())
    }

    fn check_settings_of(&self, number: usize, source: usize, kept: &[&str]) -> Result<()> {
        let (here, saved) = (&self.here[number].settings, &self.saved[source].settings);
        let is_kept = |name: &&String| kept.contains(&name.as_str());
        let known = |settings: &'a BTreeMap<String, f64>| {
            let names = settings.keys().filter(|name| !is_kept(name));
            names.map(String::as_str).collect::<Vec<_>>()
        };
        if known(here) != known(saved) {
            let reason = format!("group {number} has the settings {}", known(here).join(", "));
            return Err(Error::state("settings", reason));
        }
        match saved.iter().find(|(_, value)| !value.is_finite()) {
            None => Ok(()),
            Some((name, value)) => Err(Error::state(name, format!("{value} is not finite"))),
        }
    }

    /// Refuses a group whose parameters were saved with different `settings`, naming those that differ from the
    /// majority.
    fn check_agreement(
        &self,
        number: usize,
        sources: &[usize],
        settings: &BTreeMap<String, f64>,
    ) -> Result<()> {
        let of = |source: usize, name: &String| self.saved[source].settings.get(name);
        let differs = |one: usize, other: usize| {
            settings
                .keys()
                .find(|name| of(one, name) != of(other, name))
        };
        if sources
            .iter()
            .all(|one| differs(*one, sources[0]).is_none())
        {
            return Ok(());
        }
        let members = || {
            let names = self.here[number].parameters.iter();
            names.map(|name| (name, self.homes[name.as_str()]))
        };
        let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
        members().for_each(|(_, home)| *sizes.entry(home).or_default() += 1);
        // The first of the largest groups; reversed because `max_by_key` returns the last maximum.
        let most = sizes.iter().rev().max_by_key(|(_, size)| **size);
        let most = most.map_or(sources[0], |(home, _)| *home);
        let with = members().find(|(_, home)| *home == most);
        let with = with.map_or("", |(name, _)| name.as_str());
        let mut misfits = Misfits::default();
        for (name, home) in members() {
            let Some(setting) = differs(home, most) else {
                continue;
            };
            let told = |source| of(source, setting).copied().unwrap_or(f64::NAN);
            let reason = format!(
                "is in group {number} here, but was saved in group {home}, with {setting} {:?}; `{with}` was in group \
                 {most}, with {:?}",
                told(home),
                told(most)
            );
            misfits.add(name, reason);
        }
        misfits.refuse()
    }
}

/// The group of each parameter; an error with the reason `twice` for a name that appears twice.
fn homes<'a>(groups: &'a [GroupState], twice: &str) -> Result<HashMap<&'a str, usize>> {
    let mut homes = HashMap::new();
    for (number, group) in groups.iter().enumerate() {
        for name in &group.parameters {
            if homes.insert(name.as_str(), number).is_some() {
                return Err(Error::state(name, twice));
            }
        }
    }
    Ok(homes)
}
