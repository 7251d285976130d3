//! What is read is what was written, what is wrong is refused with its line, and nothing panics.

use proptest::prelude::*;

use super::{Event, Header, LINE_BYTES_MAX, TraceError, TraceReader, TraceWriter};

const HEADER: &str = "#alloctrace v1 streams=2 name=test\n";

fn read(text: &[u8]) -> Result<(Header, Vec<Event>), TraceError> {
    let mut reader = TraceReader::new(text)?;
    let header = reader.header().clone();
    let events = reader.by_ref().collect::<Result<_, _>>()?;
    assert!(reader.next().is_none(), "the end stays the end");
    Ok((header, events))
}

fn written(header: &Header, events: &[Event]) -> Vec<u8> {
    let mut writer = TraceWriter::new(Vec::new(), header).unwrap();
    for event in events {
        writer.write(event).unwrap();
    }
    writer.into_inner()
}

/// The error of a trace whose first line is good and which goes on with `body`, as `LINE: REASON`.
fn refusal(body: &str) -> String {
    read(format!("{HEADER}{body}").as_bytes())
        .expect_err(body)
        .to_string()
}

#[test]
fn every_event_is_read_and_written_back() {
    let text = "#alloctrace v1 streams=3 name=all threads=2 source=by-hand steps=1\n\
                m step 1\na 7 4096 0\na 8 0 2\nr 7 1\nw 1 0\nk 1\nf 7 1\nh 1\nf 8\ns 1\ns\nt\na 7 1 1\n";
    let (header, events) = read(text.as_bytes()).unwrap();
    assert_eq!((header.streams, header.threads), (3, 2));
    assert_eq!(header.name, "all");
    assert_eq!(header.others[1], ("steps".to_owned(), "1".to_owned()));
    assert_eq!(events[0], Event::Mark("step 1".to_owned()));
    assert_eq!(
        events[2],
        Event::Allocate {
            id: 8,
            bytes: 0,
            stream: 2
        }
    );
    assert_eq!(
        events[6],
        Event::Free {
            id: 7,
            stream: Some(1)
        }
    );
    assert_eq!(events[7], Event::Thread { thread: 1 });
    assert_eq!(events[10], Event::Synchronize { stream: None });
    assert_eq!(events.len(), 13);
    assert_eq!(String::from_utf8(written(&header, &events)).unwrap(), text);
}

#[test]
fn comments_blanks_and_defaults_are_understood() {
    let text = format!("{HEADER}\n# a comment\n  a\t1   512  \r\n f 1\nm\n");
    let (_, events) = read(text.as_bytes()).unwrap();
    let expected = [
        Event::Allocate {
            id: 1,
            bytes: 512,
            stream: 0,
        },
        Event::Free {
            id: 1,
            stream: None,
        },
        Event::Mark(String::new()),
    ];
    assert_eq!(events, expected);
}

#[test]
fn lines_are_counted_as_an_editor_counts_them() {
    let text = format!("{HEADER}# comment\n\na 1 2 0\nf 1\n");
    let mut reader = TraceReader::new(text.as_bytes()).unwrap();
    let lines: Vec<_> = std::iter::from_fn(|| reader.next().map(|_| reader.line())).collect();
    assert_eq!(lines, [4, 5]);
}

#[test]
fn headers_that_are_none_are_refused() {
    let not_a_trace = "1: not a trace: ";
    let cases = [
        ("", not_a_trace),
        ("\n", not_a_trace),
        ("a 1 2 0\n", not_a_trace),
        ("#alloctrace\n", not_a_trace),
        ("#alloctraces v1 streams=1 name=x\n", not_a_trace),
        (
            "#alloctrace v1 streams=1 na",
            "1: the file ends in the middle",
        ),
        ("#alloctrace v2 streams=1 name=x\n", "1: version \"v2\""),
        ("#alloctrace v1 name=x\n", "1: header: streams= is missing"),
        ("#alloctrace v1 streams=1\n", "1: header: name= is missing"),
        (
            "#alloctrace v1 streams=1 streams=2 name=x\n",
            "1: header: streams is given twice",
        ),
        (
            "#alloctrace v1 streams=1 name=x loose\n",
            "1: header: \"loose\" is not key=value",
        ),
        (
            "#alloctrace v1 streams=0 name=x\n",
            "1: header: streams=0 is not a number from 1",
        ),
        (
            "#alloctrace v1 streams=65537 name=x\n",
            "1: header: streams=65537 is not",
        ),
        (
            "#alloctrace v1 streams=-1 name=x\n",
            "1: header: streams=-1 is not",
        ),
        (
            "#alloctrace v1 streams=1 name=x threads=0\n",
            "1: header: threads=0 is not a number from 1 to 64",
        ),
        (
            "#alloctrace v1 streams=1 name=x threads=65\n",
            "1: header: threads=65 is not a number from 1 to 64",
        ),
        (
            "#alloctrace v1 streams=1 threads=2 name=x threads=2\n",
            "1: header: threads is given twice",
        ),
    ];
    for (text, expected) in cases {
        let message = read(text.as_bytes()).expect_err(text).to_string();
        assert!(message.starts_with(expected), "{text:?}: {message}");
    }
}

#[test]
fn lines_that_are_wrong_by_themselves_are_refused() {
    let cases = [
        (
            "x 1\n",
            "2: unknown event \"x\": alloctrace v1 has the events a, f, h, k, m, r, s, t and w",
        ),
        ("h\n", "2: event h takes 1 fields, but has 0"),
        (
            "h 1\n",
            "2: host thread 1 does not exist: the header says threads=1",
        ),
        (
            "h 4294967296\n",
            "2: thread 4294967296 is too large: it must be below 2^32",
        ),
        ("allocate 1 2\n", "2: unknown event \"allocate\""),
        ("m ok\n\u{1b}[2J\n", "3: unknown event \"\\u{1b}[2J\""),
        ("a 1\n", "2: event a takes 2 or 3 fields, but has 1"),
        ("a 1 2 0 0\n", "2: event a takes 2 or 3 fields, but has 4"),
        ("f\n", "2: event f takes 1 or 2 fields, but has 0"),
        ("r 1\n", "2: event r takes 2 fields, but has 1"),
        ("w 1\n", "2: event w takes 2 fields, but has 1"),
        ("s 0 1\n", "2: event s takes 0 or 1 fields, but has 2"),
        ("t 0\n", "2: event t takes 0 fields, but has 1"),
        ("k\n", "2: event k takes 1 fields, but has 0"),
        (
            "a 1 2 2\n",
            "2: stream 2 does not exist: the header says streams=2",
        ),
        ("w 0 9\n", "2: stream 9 does not exist"),
        (
            "a 1 4294967296 4294967296\n",
            "2: stream 4294967296 is too large",
        ),
        (
            "a 1 18446744073709551616 0\n",
            "2: bytes 18446744073709551616 is too large: it must be",
        ),
        (
            "a 9223372036854775808 1 0\n",
            "2: id 9223372036854775808 is too large",
        ),
        ("a 1 -5 0\n", "2: bytes \"-5\" is not a decimal number"),
        ("a 1 +5 0\n", "2: bytes \"+5\" is not a decimal number"),
        ("a 0x10 5 0\n", "2: id \"0x10\" is not a decimal number"),
        ("a 1 2 0", "2: the file ends in the middle of this line"),
    ];
    for (body, expected) in cases {
        let message = refusal(body);
        assert!(message.starts_with(expected), "{body:?}: {message}");
    }
    assert!(read(format!("{HEADER}a 1 18446744073709551615 0\n").as_bytes()).is_ok());
}

#[test]
fn ids_are_followed_from_allocation_to_free() {
    let cases = [
        (
            "a 1 2 0\na 1 2 0\n",
            "3: id 1 is already live, allocated on line 2",
        ),
        (
            "a 1 2 0\nf 1\nm\nf 1\n",
            "5: id 1 was already freed on line 3",
        ),
        (
            "a 1 2 0\nf 1\nr 1 1\n",
            "4: id 1 was already freed on line 3",
        ),
        ("f 1\n", "2: id 1 was never allocated"),
        ("a 2 2 0\nr 1 1\n", "3: id 1 was never allocated"),
    ];
    for (body, expected) in cases {
        assert_eq!(refusal(body), expected);
    }
}

#[test]
fn what_is_not_text_is_refused() {
    let mut text = HEADER.as_bytes().to_vec();
    text.extend(b"a 1 2 0\nm \xff\xfe\n");
    assert_eq!(
        read(&text).unwrap_err().to_string(),
        "3: not text: the line is not valid UTF-8"
    );
    assert!(refusal(&"m".repeat(LINE_BYTES_MAX + 1)).starts_with("2: the line is longer than"));
    let zeros = vec![0; 4 * LINE_BYTES_MAX];
    assert!(
        read(&zeros)
            .unwrap_err()
            .to_string()
            .starts_with("1: not a trace")
    );
}

#[test]
fn the_longest_line_goes_both_ways() {
    let header = Header {
        streams: 1,
        threads: 1,
        name: "x".to_owned(),
        others: Vec::new(),
    };
    let mark = |bytes| Event::Mark("m".repeat(bytes));
    let events = vec![mark(LINE_BYTES_MAX - 2), Event::Trim];
    assert_eq!(
        read(&written(&header, &events)).unwrap(),
        (header.clone(), events)
    );
    let mut writer = TraceWriter::new(Vec::new(), &header).unwrap();
    assert!(writer.write(&mark(LINE_BYTES_MAX - 1)).is_err());
}

#[test]
fn the_writer_refuses_what_would_not_come_back() {
    let header = Header {
        streams: 2,
        threads: 1,
        name: "x".to_owned(),
        others: Vec::new(),
    };
    let mut writer = TraceWriter::new(Vec::new(), &header).unwrap();
    let refused = [
        Event::Allocate {
            id: 1 << 63,
            bytes: 1,
            stream: 0,
        },
        Event::Allocate {
            id: 1,
            bytes: 1,
            stream: 2,
        },
        Event::Wait {
            waiter: 0,
            signaller: 2,
        },
        Event::Free {
            id: 1,
            stream: Some(5),
        },
        Event::Thread { thread: 1 },
        Event::Mark("two\nlines".to_owned()),
        Event::Mark(" leading".to_owned()),
    ];
    for event in refused {
        assert!(writer.write(&event).is_err(), "{event:?}");
    }
    writer.write(&Event::Trim).unwrap();
    assert_eq!(writer.into_inner(), b"#alloctrace v1 streams=2 name=x\nt\n");
    for threads in [0, 65] {
        let header = Header {
            threads,
            ..header.clone()
        };
        assert!(TraceWriter::new(Vec::new(), &header).is_err(), "{threads}");
    }
    for name in ["", "two words", "a\nb"] {
        let header = Header {
            name: name.to_owned(),
            ..header.clone()
        };
        assert_eq!(
            TraceWriter::new(Vec::new(), &header).is_ok(),
            name.is_empty(),
            "{name:?}"
        );
    }
}

/// Events that name live ids only, from arbitrary choices.
fn events(choices: &[(u8, u64, u32)], (streams, threads): (u32, u32)) -> Vec<Event> {
    let (mut live, mut next) = (Vec::new(), 0);
    let events = choices.iter().map(|&(kind, number, stream)| {
        let (stream, thread) = (stream % streams, stream % threads);
        let chosen = usize::try_from(number).unwrap() % live.len().max(1);
        match kind % 9 {
            1 if !live.is_empty() => {
                let stream = (number % 2 == 0).then_some(stream);
                Event::Free {
                    id: live.swap_remove(chosen),
                    stream,
                }
            }
            2 if !live.is_empty() => Event::RecordStream {
                id: live[chosen],
                stream,
            },
            3 => Event::Wait {
                waiter: stream,
                signaller: (stream + 1) % streams,
            },
            4 => Event::Synchronize {
                stream: (number % 2 == 0).then_some(stream),
            },
            5 => Event::Trim,
            6 => Event::Kernel { stream },
            7 => Event::Thread { thread },
            8 => Event::Mark(format!("step {number}")),
            _ => {
                live.push(next);
                next += 1;
                Event::Allocate {
                    id: next - 1,
                    bytes: number,
                    stream,
                }
            }
        }
    });
    events.collect()
}

proptest! {
    #[test]
    fn reading_gives_back_what_was_written(
        choices in prop::collection::vec(any::<(u8, u64, u32)>(), 0..200),
        streams in 1..9u32,
        threads in 1..=64u32,
        name in "[a-z0-9_=]{0,12}",
    ) {
        let others = vec![("steps".to_owned(), "3".to_owned())];
        let header = Header { streams, threads, name, others };
        let events = events(&choices, (streams, threads));
        let text = written(&header, &events);
        let (header_read, events_read) = read(&text).unwrap();
        prop_assert_eq!(written(&header_read, &events_read), text);
        prop_assert_eq!((header_read, events_read), (header, events));
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        drop(read(&bytes));
        drop(read(&[HEADER.as_bytes(), &bytes].concat()));
    }

    #[test]
    fn no_text_of_the_formats_own_letters_makes_the_reader_panic(body in "[afhrwstkm#0-9 \n]{0,300}") {
        drop(read(format!("{HEADER}{body}").as_bytes()));
    }
}
