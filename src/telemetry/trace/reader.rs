//! Traces as a stream of checked events.

use std::collections::HashMap;
use std::io::{BufRead, Read};

use super::error::Reason;
use super::{Event, Header, LINE_BYTES_MAX, TraceError, parse};

/// What some editors put in front of text in UTF-8.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Reads a trace event by event and refuses the first line that is wrong, by itself or after what came
/// before: ids are live from their allocation to their free, streams are among the header's.
///
/// Takes memory for the ids, not for the events: some 40 bytes for each distinct id, so that an error can
/// name the line that it contradicts. Nothing comes after an error.
#[derive(Debug)]
pub struct TraceReader<R> {
    input: R,
    header: Header,
    /// The line in `text`, from 1.
    line: u64,
    text: Vec<u8>,
    ids: HashMap<u64, Held>,
    failed: bool,
}

/// What the last line about an id did to it.
#[derive(Clone, Copy, Debug)]
enum Held {
    Since(u64),
    Until(u64),
}

impl<R: BufRead> TraceReader<R> {
    /// A reader behind the header of `input`.
    ///
    /// # Errors
    /// [`TraceError`] for line 1 if that is no header.
    pub fn new(input: R) -> Result<Self, TraceError> {
        let header = Header {
            streams: 0,
            threads: 1,
            name: String::new(),
            others: Vec::new(),
        };
        let (text, ids) = (Vec::new(), HashMap::new());
        let mut reader = Self {
            input,
            header,
            line: 0,
            text,
            ids,
            failed: false,
        };
        reader.header = reader.read_header().map_err(|reason| reason.at(1))?;
        Ok(reader)
    }

    /// What the first line said.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Line of the event that was given last, from 1.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line
    }

    fn read_header(&mut self) -> Result<Header, Reason> {
        match self.next_line() {
            Ok(true) => {
                let line = std::str::from_utf8(&self.text).map_err(|_| Reason::NoHeader)?;
                parse::header(line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line))
            }
            // What is too long, cut off or empty here may be anything.
            Ok(false) | Err(Reason::LineTooLong) => Err(Reason::NoHeader),
            Err(reason) => Err(reason),
        }
    }

    /// Takes the next line, without its newline, into `text`; `false` at the end of the input, before which there may
    /// be blanks.
    fn next_line(&mut self) -> Result<bool, Reason> {
        self.text.clear();
        self.line += 1;
        let most = LINE_BYTES_MAX as u64 + 1;
        self.input
            .by_ref()
            .take(most)
            .read_until(b'\n', &mut self.text)?;
        let is_blank = self.text.iter().all(u8::is_ascii_whitespace);
        match self.text.pop() {
            None => Ok(false),
            Some(b'\n') => Ok(true),
            Some(_) if self.text.len() == LINE_BYTES_MAX => Err(Reason::LineTooLong),
            Some(_) if is_blank => Ok(false),
            Some(_) => Err(Reason::CutOff),
        }
    }

    fn next_event(&mut self) -> Result<Option<Event>, Reason> {
        while self.next_line()? {
            let text = std::str::from_utf8(&self.text).map_err(|_| Reason::NotText)?;
            if let Some(event) = parse::event(text, &self.header)? {
                self.follow(&event)?;
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Checks the event's id against those before and notes what becomes of it.
    fn follow(&mut self, event: &Event) -> Result<(), Reason> {
        match *event {
            Event::Allocate { id, .. } => {
                if let Some(Held::Since(since)) = self.ids.insert(id, Held::Since(self.line)) {
                    return Err(Reason::AlreadyLive { id, since });
                }
            }
            Event::Free { id, .. } => *self.live(id)? = Held::Until(self.line),
            Event::RecordStream { id, .. } => {
                self.live(id)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn live(&mut self, id: u64) -> Result<&mut Held, Reason> {
        match self.ids.get_mut(&id) {
            None => Err(Reason::NeverAllocated { id }),
            Some(Held::Until(since)) => Err(Reason::AlreadyFreed { id, since: *since }),
            Some(held) => Ok(held),
        }
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = Result<Event, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self
            .next_event()
            .map_err(|reason| reason.at(self.line))
            .transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}
