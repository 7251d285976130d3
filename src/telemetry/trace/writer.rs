//! Traces as text.

use std::io::{self, Write};

use super::error::Reason;
use super::{Event, Header, ID_END, LINE_BYTES_MAX, STREAMS_MAX, THREADS_MAX, TraceError, parse};

/// Writes a trace that [`TraceReader`](super::TraceReader) gives back event for event.
///
/// Ids are the caller's affair: whether they are live is not followed here. Writes are many and small, so
/// give it a buffered writer; flushing is the caller's affair too.
#[derive(Debug)]
pub struct TraceWriter<W> {
    output: W,
    streams: u32,
    threads: u32,
    /// Lines written.
    line: u64,
}

impl<W: Write> TraceWriter<W> {
    /// A writer with the header written.
    ///
    /// # Errors
    /// [`TraceError`] if the header would be read as another one, or `output` fails.
    pub fn new(output: W, header: &Header) -> Result<Self, TraceError> {
        let mut text = format!(
            "#alloctrace v1 streams={} name={}",
            header.streams, header.name
        );
        if header.threads != 1 {
            text.push_str(&format!(" threads={}", header.threads));
        }
        for (key, value) in &header.others {
            text.push_str(&format!(" {key}={value}"));
        }
        let mut writer = Self {
            output,
            streams: header.streams,
            threads: header.threads,
            line: 0,
        };
        // What a key may look like is the reader's knowledge: a header is good if it reads back.
        if !(1..=STREAMS_MAX).contains(&header.streams) {
            return Err(Reason::streams_out_of_range(&header.streams.to_string()).at(1));
        }
        if !(1..=THREADS_MAX).contains(&header.threads) {
            return Err(Reason::threads_out_of_range(&header.threads.to_string()).at(1));
        }
        if parse::header(&text).ok().as_ref() != Some(header) {
            return Err(Reason::Header("a key or value is not one word".to_owned()).at(1));
        }
        writer.write_line(&text)?;
        Ok(writer)
    }

    /// Writes one event.
    ///
    /// # Errors
    /// [`TraceError`] for a stream, thread, id or mark that the format does not allow, with nothing written; or if
    /// the output fails.
    pub fn write(&mut self, event: &Event) -> Result<(), TraceError> {
        self.check(event)
            .map_err(|reason| reason.at(self.line + 1))?;
        let text = match event {
            Event::Allocate { id, bytes, stream } => format!("a {id} {bytes} {stream}"),
            Event::Free { id, stream: None } => format!("f {id}"),
            Event::Free {
                id,
                stream: Some(stream),
            } => format!("f {id} {stream}"),
            Event::RecordStream { id, stream } => format!("r {id} {stream}"),
            Event::Wait { waiter, signaller } => format!("w {waiter} {signaller}"),
            Event::Synchronize { stream: None } => "s".to_owned(),
            Event::Synchronize {
                stream: Some(stream),
            } => format!("s {stream}"),
            Event::Trim => "t".to_owned(),
            Event::Thread { thread } => format!("h {thread}"),
            Event::Kernel { stream } => format!("k {stream}"),
            Event::Mark(text) => format!("m {text}"),
        };
        self.write_line(&text)
    }

    /// Flushes the output.
    ///
    /// # Errors
    /// If it fails.
    pub fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }

    /// The output, with everything written to it.
    pub fn into_inner(self) -> W {
        self.output
    }

    fn check(&self, event: &Event) -> Result<(), Reason> {
        let (id, streams) = match *event {
            Event::Allocate { id, stream, .. } | Event::RecordStream { id, stream } => {
                (Some(id), [Some(stream), None])
            }
            Event::Free { id, stream } => (Some(id), [stream, None]),
            Event::Wait { waiter, signaller } => (None, [Some(waiter), Some(signaller)]),
            Event::Synchronize { stream } => (None, [stream, None]),
            Event::Kernel { stream } => (None, [Some(stream), None]),
            Event::Thread { .. } | Event::Trim | Event::Mark(_) => (None, [None, None]),
        };
        if let Some(id) = id.filter(|id| *id >= ID_END) {
            return Err(Reason::TooLarge {
                field: "id",
                text: id.to_string(),
                bits: 63,
            });
        }
        if let Some(stream) = streams
            .into_iter()
            .flatten()
            .find(|stream| *stream >= self.streams)
        {
            return Err(Reason::NoSuchStream {
                stream: stream.into(),
                streams: self.streams,
            });
        }
        match event {
            Event::Thread { thread } if *thread >= self.threads => Err(Reason::NoSuchThread {
                thread: (*thread).into(),
                threads: self.threads,
            }),
            Event::Mark(text) if text.contains('\n') || text.trim_ascii() != text => {
                Err(Reason::Mark)
            }
            _ => Ok(()),
        }
    }

    fn write_line(&mut self, text: &str) -> Result<(), TraceError> {
        self.line += 1;
        if text.len() > LINE_BYTES_MAX {
            return Err(Reason::LineTooLong.at(self.line));
        }
        writeln!(self.output, "{text}").map_err(|error| Reason::Io(error).at(self.line))
    }
}
