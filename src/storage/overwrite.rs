//! Overwrites several tensors from the host, all or none.
//!
//! The tensors keep their memory and therefore their addresses, which captured graphs and kernel tables refer to. The
//! old elements are first copied to the host: if the driver refuses a write half way, they are written back.

use std::fmt;

use super::{HostTensor, Tensor, moment};
use crate::error::{Error, Result};

/// A prepared change in three parts: attempts on the host that can fail and be rolled back, then writes to tensors,
/// then commits on the host that cannot fail. Nothing changes before [`carry_out`](Self::carry_out).
#[derive(Default)]
pub(crate) struct Load<'a> {
    attempts: Vec<Box<dyn Attempt + 'a>>,
    writes: Vec<(Tensor, HostTensor)>,
    commits: Vec<Box<dyn FnOnce() + 'a>>,
}

/// A change on the host that can fail.
pub(crate) trait Attempt {
    /// Makes the change, all of it or nothing.
    fn make(&mut self) -> Result<()>;

    /// Rolls it back.
    fn take_back(&mut self) -> Result<()>;
}

impl<'a> Load<'a> {
    /// A change that only writes elements.
    pub(crate) fn writing(writes: Vec<(Tensor, HostTensor)>) -> Self {
        Self {
            writes,
            ..Self::default()
        }
    }

    /// Makes `attempt` before anything is written.
    pub(crate) fn after(mut self, attempt: impl Attempt + 'a) -> Self {
        self.attempts.push(Box::new(attempt));
        self
    }

    /// Calls `commit` after everything else has succeeded.
    pub(crate) fn then(mut self, commit: impl FnOnce() + 'a) -> Self {
        self.commits.push(Box::new(commit));
        self
    }

    /// Combines both changes into one.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.attempts.extend(other.attempts);
        self.writes.extend(other.writes);
        self.commits.extend(other.commits);
        self
    }

    /// Makes the change, all of it or nothing, and waits until it is done.
    ///
    /// # Errors
    /// As [`overwrite`], or the error of an attempt.
    pub(crate) fn carry_out(mut self) -> Result<()> {
        let mut attempted = self.attempts.iter_mut().enumerate();
        let refused = attempted.find_map(|(index, attempt)| Some((index, attempt.make().err()?)));
        let (made, error) = match refused {
            Some((index, error)) => (index, error),
            None => match overwrite(&self.writes) {
                Ok(()) => {
                    self.commits.into_iter().for_each(|commit| commit());
                    return Ok(());
                }
                Err(error) => (self.attempts.len(), error),
            },
        };
        let back = self.attempts[..made].iter_mut().rev();
        // Roll back all of them, even if one fails.
        let back: Vec<_> = back.map(|attempt| attempt.take_back()).collect();
        Err(told_with(error, back.into_iter().collect()))
    }
}

impl fmt::Debug for Load<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Load({} tensors)", self.writes.len())
    }
}

/// `error`, extended with a note that the previous state is lost if `back` is an error.
fn told_with(error: Error, back: Result<()>) -> Error {
    match (error, back) {
        (Error::Driver { call, code, reason }, Err(second)) => Error::Driver {
            call,
            code,
            reason: format!("{reason}; the previous state could not be restored: {second}"),
        },
        (error, _) => error,
    }
}

/// Overwrites each tensor with the elements paired with it, in stream order, and waits until they are written.
/// Allocates no device memory.
///
/// # Errors
/// [`Error::InvalidArgument`] for a different shape or type, or a tensor that is not contiguous;
/// [`Error::Driver`] if the driver refuses. All tensors are then unchanged; if writing the old elements back fails as
/// well, the error says so.
///
/// Afterwards, all tensors that keep a [version](Tensor::version) have the same one, which shows that their elements
/// belong together. If the old elements were written back, the tensors have their old versions.
fn overwrite(writes: &[(Tensor, HostTensor)]) -> Result<()> {
    for (tensor, elements) in writes {
        if !tensor.is_contiguous() {
            return Err(Error::argument("overwrite", "a tensor is not contiguous"));
        }
        if tensor.dtype() != elements.dtype() || tensor.shape() != elements.shape() {
            let reason = format!("{elements:?} does not fit {tensor:?}");
            return Err(Error::argument("overwrite", reason));
        }
    }
    let before = writes.iter().map(|(tensor, _)| tensor.to_host());
    let before: Vec<_> = before.collect::<Result<_>>()?;
    let versions: Vec<_> = writes.iter().map(|(tensor, _)| tensor.version()).collect();
    let write = |(tensor, elements): (&Tensor, &HostTensor)| {
        tensor.buffer().write(tensor.start_byte(), elements.bytes())
    };
    let tensors = || writes.iter().map(|(tensor, _)| tensor);
    let all = |elements: Vec<&HostTensor>| {
        tensors().zip(elements).try_for_each(write)?;
        tensors().try_for_each(|tensor| tensor.context().synchronize())
    };
    let Err(error) = all(writes.iter().map(|(_, elements)| elements).collect()) else {
        let now = moment();
        tensors().for_each(|tensor| tensor.set_version(now));
        return Ok(());
    };
    let back = all(before.iter().collect());
    if back.is_ok() {
        let kept = tensors().zip(versions);
        kept.filter_map(|(tensor, version)| Some((tensor, version?)))
            .for_each(|(tensor, version)| tensor.set_version(version));
    }
    Err(told_with(error, back))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::fault::FaultDriver;
    use crate::driver::{Device, HostConfig};
    use crate::storage::Context;

    /// Two tensors and a view into a third, with what is written to them.
    fn writes(context: &Context) -> Vec<(Tensor, HostTensor)> {
        let plain = Tensor::from_slice(context, [2], &[1f32, 2.0]).expect("memory");
        let part = Tensor::from_slice(context, [4], &[3u32, 4, 5, 6]).expect("memory");
        let part = part.narrow(0, 1, 2).expect("it is long enough");
        vec![
            (
                plain,
                HostTensor::from_slice([2], &[-1f32, f32::NAN]).expect("two"),
            ),
            (
                part,
                HostTensor::from_slice([2], &[40u32, 50]).expect("two"),
            ),
        ]
    }

    fn now(writes: &[(Tensor, HostTensor)]) -> Vec<HostTensor> {
        let tensors = writes.iter().map(|(tensor, _)| tensor.to_host());
        tensors.collect::<Result<_>>().expect("the device works")
    }

    #[test]
    fn whichever_call_fails_all_are_written_or_none() {
        let host = Device::host(HostConfig::default()).expect("the machine has memory");
        let faults = Arc::new(FaultDriver::new(host.driver().clone()));
        let context = Context::new(&Device::from_driver(faults.clone())).expect("a context");
        let mut failures = 0;
        for nth in 1.. {
            let writes = writes(&context);
            let versions = || writes.iter().map(|(tensor, _)| tensor.version());
            writes.iter().for_each(|(tensor, _)| tensor.keep_version());
            let (before, versions_before) = (now(&writes), versions().collect::<Vec<_>>());
            faults.fail_nth(None, nth);
            let outcome = overwrite(&writes);
            let through = faults.disarm() > 0;
            if through {
                outcome.expect("nothing failed");
                let after: Vec<_> = writes
                    .iter()
                    .map(|(_, elements)| elements.clone())
                    .collect();
                assert_eq!(now(&writes), after);
                let versions: Vec<_> = versions().collect();
                assert_eq!(versions[0], versions[1], "written together");
                assert!(versions[0] > versions_before[0].max(versions_before[1]));
                break;
            }
            outcome.expect_err("a call failed");
            assert_eq!(now(&writes), before, "call {nth}");
            assert!(versions().eq(versions_before), "call {nth}");
            failures += 1;
        }
        assert!(failures >= 4, "reads and writes: {failures}");
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let host = Device::host(HostConfig::default()).expect("the machine has memory");
        let context = Context::new(&host).expect("a context");
        let mut writes = writes(&context);
        let before = now(&writes);
        writes[1].1 = HostTensor::from_slice([2], &[1f32, 2.0]).expect("two");
        assert!(overwrite(&writes).is_err());
        assert_eq!(now(&writes), before);
    }
}
