//! The images: 8x8 handwritten digits, one per line, 64 pixels in 0..=16 and then the digit, comma-separated.
//!
//! The file comes from the user, so everything about it is checked, and errors name the line and column. Empty lines at
//! the end are ignored. Every fifth image is held back for testing.

use std::borrow::Cow;
use std::path::Path;

use crate::data_file;
use crate::failure::{Failure, one_line};
use crate::fingerprint::Fingerprint;

/// Pixels of one image.
pub(crate) const PIXELS: usize = 64;
/// The number of different digits.
pub(crate) const CLASSES: usize = 10;
const PIXEL_MAX: u32 = 16;
const DIGIT_MAX: u32 = 9;
/// One image in this many is for testing only.
const TEST_EVERY: usize = 5;
/// The images that come with the program.
const BUILT_IN: &str = include_str!("../data/digits.csv");

/// Images with their digits.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Images {
    /// [`PIXELS`] values per image, from -1.0 (paper) to 1.0 (ink): centered inputs train faster.
    pub(crate) pixels: Vec<f32>,
    /// One digit per image.
    pub(crate) labels: Vec<u32>,
}

impl Images {
    /// The number of images.
    pub(crate) fn count(&self) -> usize {
        self.labels.len()
    }
}

/// The training images and the test images. Neither set is empty.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Digits {
    pub(crate) train: Images,
    pub(crate) test: Images,
}

impl Digits {
    /// Reads `path`, or the images that come with the program.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, Failure> {
        match path {
            None => Self::parse(BUILT_IN.as_bytes()).map_err(Failure::Run),
            Some(path) => data_file::load(path, Self::parse),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let line = bytes[..error.valid_up_to()]
                .iter()
                .filter(|&&b| b == b'\n')
                .count()
                + 1;
            format!("line {line}: not UTF-8 text")
        })?;
        let (mut train, mut test) = (Images::default(), Images::default());
        let lines: Vec<_> = text.lines().collect();
        let last = lines.iter().rposition(|line| !line.trim().is_empty());
        let images = &lines[..last.map_or(0, |index| index + 1)];
        for (index, line) in images.iter().enumerate() {
            let set = if index % TEST_EVERY == TEST_EVERY - 1 {
                &mut test
            } else {
                &mut train
            };
            parse_line(line, set).map_err(|reason| format!("line {}: {reason}", index + 1))?;
        }
        if test.labels.is_empty() {
            return Err(format!(
                "{} images; at least {TEST_EVERY} are needed, so that one can be used for testing",
                train.count()
            ));
        }
        Ok(Self { train, test })
    }

    /// The fingerprint of the numbers, independent of how the file formats them.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let parts = [&self.train, &self.test].map(|images| {
            let labels = bytemuck::cast_slice(&images.labels);
            [bytemuck::cast_slice(&images.pixels), labels]
        });
        Fingerprint::of(parts.into_iter().flatten())
    }
}

/// Adds the image of one line to `set`.
fn parse_line(line: &str, set: &mut Images) -> Result<(), String> {
    let columns = line.split(',').count();
    if columns != PIXELS + 1 {
        return Err(format!(
            "{columns} columns, not {} ({PIXELS} pixels and the digit)",
            PIXELS + 1
        ));
    }
    for (index, column) in line.split(',').enumerate() {
        let (what, max) = if index < PIXELS {
            ("pixel", PIXEL_MAX)
        } else {
            ("digit", DIGIT_MAX)
        };
        let value = column
            .parse::<u32>()
            .ok()
            .filter(|value| *value <= max)
            .ok_or_else(|| {
                format!(
                    "column {}: {what} `{}` is not a whole number in 0..={max}",
                    index + 1,
                    shown(column)
                )
            })?;
        if index < PIXELS {
            set.pixels
                .push(value as f32 / (PIXEL_MAX as f32 / 2.0) - 1.0);
        } else {
            set.labels.push(value);
        }
    }
    Ok(())
}

/// `column`, shortened for a message.
fn shown(column: &str) -> Cow<'_, str> {
    const CHARS_MAX: usize = 20;
    match column.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => Cow::Owned(one_line(&column[..end]) + "…"),
        None => Cow::Borrowed(column),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` lines of images whose pixels and digits are all `value`.
    fn lines(count: usize, value: u32) -> String {
        format!("{}\n", vec![value.to_string(); PIXELS + 1].join(",")).repeat(count)
    }

    fn refusal(text: impl AsRef<[u8]>) -> String {
        Digits::parse(text.as_ref()).expect_err("bad input")
    }

    #[test]
    fn the_built_in_images_are_split_four_to_one() {
        let digits = Digits::load(None).unwrap();
        assert_eq!((digits.train.count(), digits.test.count()), (1438, 359));
        assert_eq!(digits.train.pixels.len(), 1438 * PIXELS);
        // The first image is a 0 whose third pixel is 5.
        assert_eq!(
            (digits.train.labels[0], digits.train.pixels[2]),
            (0, 5.0 / 8.0 - 1.0)
        );
        // The fifth is a 4, and the first of the test set.
        assert_eq!(digits.test.labels[0], 4);
    }

    #[test]
    fn line_ends_of_both_kinds_are_taken() {
        let text = lines(5, 3);
        let unix = Digits::parse(text.as_bytes()).unwrap();
        let windows = Digits::parse(text.replace('\n', "\r\n").as_bytes()).unwrap();
        assert_eq!(unix, windows);
        assert_eq!(unix.train.pixels[0], 3.0 / 8.0 - 1.0);
        assert_eq!(unix.test.labels, [3]);
    }

    #[test]
    fn empty_lines_at_the_end_mean_nothing() {
        let text = lines(5, 3);
        let whole = Digits::parse(text.as_bytes()).unwrap();
        let cut = text.strip_suffix('\n').unwrap();
        for end in ["", "\n", "\n\n\n", "\r\n\r\n", "\n \t\n", "\n  "] {
            let digits = Digits::parse(format!("{cut}{end}").as_bytes()).unwrap();
            assert_eq!(digits, whole, "{end:?}");
        }
        assert!(refusal("\n\n\n\n\n\n").starts_with("0 images; at least 5"));
    }

    #[test]
    fn the_fingerprint_is_of_the_numbers() {
        let of = |text: String| Digits::parse(text.as_bytes()).unwrap().fingerprint();
        let text = lines(6, 3);
        assert_eq!(of(text.clone()), of(text.replace('\n', "\r\n") + "\n"));
        // A pixel, a digit, an image to test with, one more.
        assert_ne!(of(text.clone()), of(text.replacen('3', "4", 1)));
        assert_ne!(of(text.clone()), of(text.replacen("3\n", "4\n", 1)));
        assert_ne!(of(text), of(lines(4, 3) + &lines(1, 4) + &lines(1, 3)));
        assert_ne!(of(lines(6, 3)), of(lines(7, 3)));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        assert!(refusal("").starts_with("0 images; at least 5"));
        assert!(refusal(lines(4, 3)).starts_with("4 images; at least 5"));
        let gap = lines(2, 3) + "\n" + &lines(3, 3);
        assert!(refusal(gap).starts_with("line 3: 1 columns, not 65"));
        assert!(refusal(lines(2, 3) + "1,2,3").starts_with("line 3: 3 columns"));
        let digit = lines(1, 3).replace(",3\n", ",12\n");
        assert!(
            refusal(digit).contains("line 1: column 65: digit `12` is not a whole number in 0..=9")
        );
        let pixel = lines(4, 3) + &lines(1, 3).replacen('3', "17", 1);
        assert!(refusal(pixel).contains("line 5: column 1: pixel `17`"));
        for bad in ["-1", "1.5", "x", "", " 1", "99999999999999999999"] {
            let text = lines(1, 3).replacen('3', bad, 1);
            assert!(refusal(text).contains(&format!("pixel `{bad}`")));
        }
        let long = lines(1, 3).replacen('3', &"9".repeat(5000), 1);
        assert!(refusal(long).len() < 200);
        let mut bytes = lines(1, 3).into_bytes();
        bytes.extend([0xff, 0xfe]);
        assert_eq!(refusal(bytes), "line 2: not UTF-8 text");
    }
}
