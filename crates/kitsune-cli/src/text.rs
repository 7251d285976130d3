//! The training text of the language model, encoded as numbers and cut into sequences.
//!
//! Characters are bytes; the vocabulary consists of those that occur. The last tenth is held back for testing.

use std::path::Path;

use crate::data_file;
use crate::failure::Failure;
use crate::fingerprint::Fingerprint;
use crate::random::Random;

/// Most characters of one sequence.
pub(crate) const CONTEXT: usize = 64;

/// Fewest characters of one sequence.
const SHORTEST: usize = 16;

/// One character in this many is for testing.
const TEST_SHARE: usize = 10;

/// The built-in text.
const BUILT_IN: &[u8] = include_bytes!("../data/tales.txt");

/// A text, encoded as numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Text {
    /// The number of distinct characters; every encoded number is below it.
    pub(crate) vocabulary: usize,
    pub(crate) train: Vec<u32>,
    pub(crate) test: Vec<u32>,
    /// The fingerprint of the characters, since other texts can have the same numbers.
    pub(crate) fingerprint: Fingerprint,
}

/// Sequences of one length with, for each character, the one that follows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sequences {
    pub(crate) length: usize,
    pub(crate) characters: Vec<u32>,
    pub(crate) next: Vec<u32>,
}

impl Text {
    /// Reads `path`, or the built-in text.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, Failure> {
        match path {
            None => Self::of(BUILT_IN).map_err(Failure::Run),
            Some(path) => data_file::load(path, Self::of),
        }
    }

    fn of(bytes: &[u8]) -> Result<Self, String> {
        let mut numbers = [None; 256];
        let mut vocabulary = 0;
        let characters: Vec<u32> = bytes
            .iter()
            .map(|byte| {
                *numbers[usize::from(*byte)].get_or_insert_with(|| {
                    vocabulary += 1;
                    vocabulary - 1
                })
            })
            .collect();
        let test = characters.len() / TEST_SHARE;
        if test <= CONTEXT {
            let least = TEST_SHARE * (CONTEXT + 1);
            return Err(format!("{} characters, fewer than {least}", bytes.len()));
        }
        let (train, test) = characters.split_at(characters.len() - test);
        Ok(Self {
            vocabulary: vocabulary as usize,
            train: train.to_vec(),
            test: test.to_vec(),
            fingerprint: Fingerprint::of([bytes]),
        })
    }

    /// `count` sequences from random positions in the training text. All have the same length, which varies from call
    /// to call.
    pub(crate) fn draw(&self, count: usize, random: &mut Random) -> Sequences {
        let length = SHORTEST + random.below(CONTEXT - SHORTEST + 1);
        let starts = (0..count).map(|_| random.below(self.train.len() - length));
        Sequences::cut(&self.train, starts, length)
    }

    /// The test text in sequences of full length, `count` at a time. The rest at the end is not used.
    pub(crate) fn tests(&self, count: usize) -> impl Iterator<Item = Sequences> {
        let starts: Vec<_> = (0..(self.test.len() - 1) / CONTEXT)
            .map(|index| index * CONTEXT)
            .collect();
        let batches: Vec<Vec<usize>> = starts.chunks(count).map(<[usize]>::to_vec).collect();
        batches
            .into_iter()
            .map(|starts| Sequences::cut(&self.test, starts.into_iter(), CONTEXT))
    }
}

impl Sequences {
    fn cut(text: &[u32], starts: impl Iterator<Item = usize>, length: usize) -> Self {
        let starts: Vec<_> = starts.collect();
        let part = |ahead: usize| {
            let parts = starts.iter().map(|start| &text[start + ahead..][..length]);
            parts.collect::<Vec<_>>().concat()
        };
        Self {
            length,
            characters: part(0),
            next: part(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_text_is_small_and_plain() {
        let text = Text::load(None).unwrap();
        assert!(BUILT_IN.len() < 200 << 10 && BUILT_IN.is_ascii());
        assert!((30..80).contains(&text.vocabulary), "{}", text.vocabulary);
        assert_eq!(text.train.len() + text.test.len(), BUILT_IN.len());
    }

    #[test]
    fn sequences_are_followed_by_themselves_moved_by_one() {
        let text = Text::load(None).unwrap();
        let mut random = Random::new(1);
        let drawn: Vec<_> = (0..50).map(|_| text.draw(3, &mut random)).collect();
        for sequences in drawn.iter().chain(&text.tests(4).collect::<Vec<_>>()) {
            let rows = sequences.characters.chunks(sequences.length);
            for (row, next) in rows.zip(sequences.next.chunks(sequences.length)) {
                assert_eq!(row[1..], next[..next.len() - 1]);
            }
        }
        let lengths =
            |which: fn(usize, usize) -> usize| drawn.iter().map(|drawn| drawn.length).reduce(which);
        assert!(lengths(usize::min) >= Some(SHORTEST));
        assert!(lengths(usize::max) <= Some(CONTEXT));
        assert!(lengths(usize::min) < lengths(usize::max));
    }

    #[test]
    fn a_short_text_is_refused() {
        assert!(Text::of(&[b'a'; 300]).is_err());
    }
}
