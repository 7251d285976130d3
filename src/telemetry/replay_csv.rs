//! Allocation logs in the format that RMM writes and its replay benchmark reads.
//!
//! The first row is `Thread,Time,Action,Pointer,Size,Stream`; each later one is an event:
//! `12,09:30:05.000123,allocate,0x7f0000000000,4096,1`. The action is `allocate`, `free` or
//! `allocate failure`, whose pointer is `(nil)`. Sizes are the bytes asked for, in decimal. The time is UTC,
//! with microseconds and without a date; RMM's is local.
//!
//! RMM's replay refuses logs with failures. The format knows no recorded streams; they are left out.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::memory::{LogAction, LogEvent, LogSink};

/// Writes the events of a [`Log`](crate::memory::Log) as RMM's CSV. Rows are many and small: give it a
/// buffered writer.
///
/// # Examples
/// ```
/// use kitsune::memory::Log;
/// use kitsune::telemetry::ReplayCsv;
/// use kitsune::{Device, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let pool = Pool::new(&device, PoolConfig::default())?;
/// let log = Log::new(pool, ReplayCsv::new(Vec::new())?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ReplayCsv<W> {
    output: W,
}

impl<W: Write> ReplayCsv<W> {
    /// A sink with the first row written.
    ///
    /// # Errors
    /// If `output` fails.
    pub fn new(mut output: W) -> io::Result<Self> {
        writeln!(output, "Thread,Time,Action,Pointer,Size,Stream")?;
        Ok(Self { output })
    }
}

impl<W: Write + Send> LogSink for ReplayCsv<W> {
    fn write(&mut self, event: &LogEvent) -> io::Result<()> {
        let action = match event.action {
            LogAction::Allocate => "allocate",
            LogAction::Free => "free",
            LogAction::Failure => "allocate failure",
            LogAction::RecordStream => return Ok(()),
        };
        let pointer = match event.ptr.0 {
            0 => "(nil)".to_owned(),
            address => format!("{address:#x}"),
        };
        let (thread, time) = (event.thread, time_of_day(event.time));
        let (bytes, stream) = (event.bytes, event.stream.0);
        writeln!(
            self.output,
            "{thread},{time},{action},{pointer},{bytes},{stream}"
        )
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// `HH:MM:SS.uuuuuu` in UTC.
fn time_of_day(time: SystemTime) -> String {
    // A clock set before 1970 shows midnight: the column is for people.
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() % (24 * 60 * 60);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let (seconds, micros) = (seconds % 60, since.subsec_micros());
    format!("{hours:02}:{minutes:02}:{seconds:02}.{micros:06}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_of_day_have_fixed_width() {
        let day = 24 * 60 * 60;
        let at = |seconds, micros| {
            let since = Duration::from_secs(seconds) + Duration::from_micros(micros);
            time_of_day(UNIX_EPOCH + since)
        };
        assert_eq!(at(0, 0), "00:00:00.000000");
        assert_eq!(at(3 * day + 3600 + 2 * 60 + 3, 45), "01:02:03.000045");
        assert_eq!(at(day - 1, 999_999), "23:59:59.999999");
        assert_eq!(
            time_of_day(UNIX_EPOCH - Duration::from_secs(1)),
            "00:00:00.000000"
        );
    }
}
