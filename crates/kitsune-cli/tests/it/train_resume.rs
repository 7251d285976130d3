//! `kitsune train --save`, `--resume`: a run taken up by another process ends as the one that went through, to the
//! bit; what cannot be taken up is refused in one line.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::{json, kitsune, refusal};
use serde_json::Value;

/// An empty folder of the test called `name`.
fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("resume-{name}"));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).unwrap();
    path
}

/// Runs `train` with these flags, then `more`.
fn train(flags: &str, more: &[(&str, &Path)]) -> Value {
    let mut arguments: Vec<_> = "train --json --device host".split(' ').collect();
    arguments.extend(flags.split(' '));
    for (flag, path) in more {
        arguments.extend([flag, path.to_str().unwrap()]);
    }
    json(&arguments)
}

/// What `report` says of the end.
fn end(report: &Value) -> Vec<&Value> {
    let keys = [
        "final_loss",
        "test_accuracy",
        "scale",
        "steps",
        "seed",
        "dtype",
        "model",
    ];
    keys.map(|key| &report[key]).to_vec()
}

/// Trains 20 steps, one of which overflows, and takes the run up after step `stop` from the file.
fn resumed(model: &str, dtype: &str, stop: u64, overflow: u64) {
    let folder = folder(&format!("{model}-{dtype}-{stop}"));
    let size = if model == "gpt" { 2 } else { 32 };
    let flags = format!(
        "--model {model} --dtype {dtype} --steps 20 --batch-size {size} --accumulate 2 --seed 5 \
         --inject-overflow {overflow} --save-every {stop}"
    );
    let through = train(&flags, &[("--save", &folder.join("through-{step}"))]);
    let files = [
        ("--resume", folder.join(format!("through-{stop}"))),
        ("--save", folder.join("again-{step}")),
    ];
    let files = files.each_ref().map(|(flag, path)| (*flag, path.as_path()));
    let again = train(&flags, &files);
    assert_eq!(end(&again), end(&through), "{flags}");
    assert_eq!(again["first_step"], stop + 1);
    assert_eq!(again["data_changed"], false);
    assert!(through.get("data_changed").is_none(), "{through}");
    let injected = |report: &Value| {
        let overflows = report["overflows"].as_array().unwrap();
        overflows
            .iter()
            .any(|report| report["step"] == overflow && report["kind"] == "inf")
    };
    assert!(injected(&through), "{through}");
    assert_eq!(injected(&again), overflow > stop, "{again}");
    // Weights, moments, counts, scale, schedule and place in the data.
    let bytes = |name: &str| fs::read(folder.join(name)).unwrap();
    assert!(bytes("again-20") == bytes("through-20"), "{flags}");
    assert!(bytes("through-20") != bytes(&format!("through-{stop}")));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn digits_are_learned_as_if_nothing_had_stopped() {
    for dtype in ["f16", "bf16", "f32"] {
        // An overflow after the stop; one before it, that counts as such only after it.
        resumed("mlp", dtype, 7, 9);
        resumed("mlp", dtype, 12, 10);
    }
}

#[test]
fn a_text_is_learned_as_if_nothing_had_stopped() {
    for dtype in ["f16", "bf16", "f32"] {
        resumed("gpt", dtype, 7, 9);
        resumed("gpt", dtype, 12, 10);
    }
}

/// Images of which number `at` says `value` in its first pixel.
fn images(count: usize, at: usize, value: u32) -> String {
    let line = |index: usize| {
        let pixels = (0..64).map(|pixel| match (index == at, pixel) {
            (true, 0) => value.to_string(),
            _ => ((index * 7 + pixel) % 17).to_string(),
        });
        let pixels: Vec<_> = pixels.collect();
        format!("{},{}\n", pixels.join(","), index % 10)
    };
    (0..count).map(line).collect()
}

/// A text of 4,000 characters.
fn text() -> String {
    let words = ["stone ", "river ", "lantern ", "quiet ", "moon ", "a "];
    let words = (0..).map(|index: usize| words[index * index % 7 % 6]);
    words.take(1000).collect::<String>()[..4000].to_owned()
}

/// Resumes `file` with this data. Gives the report and what standard error says.
fn resumed_with(flags: &str, file: &Path, data: &Path, contents: &[u8]) -> (Value, String) {
    fs::write(data, contents).unwrap();
    let mut arguments: Vec<_> = "train --json --device host".split(' ').collect();
    arguments.extend(flags.split(' '));
    arguments.extend(["--resume", file.to_str().unwrap()]);
    arguments.extend(["--data", data.to_str().unwrap()]);
    let output = kitsune(&arguments).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    (serde_json::from_slice(&output.stdout).unwrap(), told)
}

#[test]
fn data_that_changed_is_noticed_and_used() {
    let folder = folder("data");
    let (file, data) = (folder.join("state"), folder.join("data"));
    let marked = |text: &str| format!("\u{feff}{text}");
    let digits = images(60, 3, 5);
    let tales = text();
    // What is the same, and what is not.
    let cases: [(&str, &str, Vec<String>, Vec<String>); 2] = [
        (
            "mlp",
            &digits,
            // However it is written.
            vec![
                digits.clone(),
                marked(&digits),
                digits.replace('\n', "\r\n") + "\r\n",
            ],
            vec![
                images(60, 3, 6),
                // An image that is only tested with.
                digits.replacen("\n11,", "\n12,", 1),
                images(61, 3, 5),
                images(45, 3, 5),
            ],
        ),
        (
            "gpt",
            &tales,
            vec![tales.clone(), marked(&tales)],
            vec![
                tales.replacen("stone", "notes", 1),
                // Other letters with the same numbers.
                tales.replace('v', "z"),
                format!("{tales}moon"),
            ],
        ),
    ];
    for (model, saved, same, changed) in cases {
        let flags = format!("--model {model} --batch-size 4 --seed 3");
        fs::write(&data, saved).unwrap();
        train(
            &format!("{flags} --steps 2"),
            &[("--data", &data), ("--save", &file)],
        );
        let flags = format!("{flags} --steps 4");
        let resumed = |contents: &str| resumed_with(&flags, &file, &data, contents.as_bytes());
        let mut losses = Vec::new();
        for contents in &same {
            let (report, told) = resumed(contents);
            assert_eq!(
                (&report["data_changed"], told.as_str()),
                (&false.into(), "")
            );
            losses.push(report["final_loss"].to_string());
        }
        losses.dedup();
        assert_eq!(losses.len(), 1);
        for contents in &changed {
            let (report, told) = resumed(contents);
            assert_eq!(report["data_changed"], true);
            assert_eq!(report["first_step"], 3);
            let expected = format!("warning: --resume {}: the data has changed", file.display());
            assert!(told.starts_with(&expected), "{told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
    }
    // A text of more letters needs another network.
    fs::write(&data, tales + "XYZ").unwrap();
    let (file, data) = (file.to_str().unwrap(), data.to_str().unwrap());
    let line = format!("train --model gpt --batch-size 4 --seed 3 --resume {file} --data {data}");
    let told = refusal(&line.split(' ').collect::<Vec<_>>(), 2);
    assert!(told.ends_with("(the data has changed since)\n"), "{told}");
    fs::remove_dir_all(&folder).unwrap();
}

/// `file` without the fingerprint of its data, as earlier versions wrote it.
fn without_fingerprint(file: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    let (header, data) = file[8..].split_at(usize::try_from(length).unwrap());
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let about = &mut header["__metadata__"];
    let mut state: Value = serde_json::from_str(about["state"].as_str().unwrap()).unwrap();
    let extra = state["extra"].as_object_mut().unwrap();
    extra.remove("data_fingerprint").unwrap();
    let state = state.to_string();
    about["state_crc32"] = crc32fast::hash(state.as_bytes()).to_string().into();
    about["state"] = state.into();
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

#[test]
fn a_file_of_an_earlier_version_does_not_tell_unless_places_differ() {
    let folder = folder("earlier");
    let (file, data) = (folder.join("state"), folder.join("data"));
    fs::write(&data, images(60, 3, 5)).unwrap();
    let places: [(&str, &Path); 2] = [("--data", &data), ("--save", &file)];
    train("--steps 2 --batch-size 4", &places);
    let earlier = without_fingerprint(&fs::read(&file).unwrap());
    fs::write(&file, earlier).unwrap();
    let flags = "--steps 4 --batch-size 4";
    for (contents, expected) in [
        (images(60, 3, 5), Value::Null),
        (images(60, 3, 6), Value::Null),
        (images(50, 3, 5), true.into()),
    ] {
        let (report, told) = resumed_with(flags, &file, &data, contents.as_bytes());
        assert_eq!(report.get("data_changed"), Some(&expected));
        assert_eq!(told.is_empty(), expected.is_null(), "{told}");
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_cannot_be_taken_up_is_refused_in_one_line() {
    let folder = folder("refused");
    let file = folder.join("state");
    train("--steps 3", &[("--save", &file)]);
    let file = file.to_str().unwrap();
    let told = |flags: &str, path: &str| {
        let mut arguments = vec!["train", "--device", "host", "--resume", path];
        arguments.extend(flags.split_whitespace());
        let told = refusal(&arguments, 2);
        assert!(
            told.starts_with(&format!("error: --resume {path}: ")),
            "{told}"
        );
        told
    };
    for (flags, reason) in [
        ("--steps 3", "already at step 3, with --steps 3"),
        ("--steps 9 --seed 1", "--seed was 0, is 1"),
        (
            "--steps 9 --dtype bf16 --batch-size 8",
            "--dtype was f16, is bf16; --batch-size was not given, is 8",
        ),
        ("--steps 9 --model gpt", "--model was mlp, is gpt"),
        (
            "--steps 9 --learning-rate 0.5",
            "--learning-rate was not given, is 0.5",
        ),
    ] {
        let told = told(flags, file);
        assert!(told.contains(reason), "{flags}: {told}");
    }
    let missing = folder.join("missing");
    assert!(told("", missing.to_str().unwrap()).contains("cannot read"));
    let bytes = fs::read(file).unwrap();
    let cut = folder.join("cut");
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    assert!(told("", cut.to_str().unwrap()).contains("file: "));
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&cut, &flipped).unwrap();
    let told = told("", cut.to_str().unwrap());
    assert!(
        told.contains("optimizer/") && told.contains("checksum"),
        "{told}"
    );
    // More steps than planned at first are no other run.
    let more = train("--steps 5", &[("--resume", Path::new(file))]);
    assert_eq!(
        (&more["first_step"], &more["steps"]),
        (&4.into(), &5.into())
    );
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_place_that_cannot_be_written_is_refused_first() {
    let folder = folder("place");
    let state = folder.join("state");
    let long = folder.join("n".repeat(250) + "{step}");
    for (path, reason) in [
        (folder.join("missing").join("state"), "no such directory"),
        (folder.clone(), "is a directory"),
        (folder.join("{step}").join("state"), "no such directory"),
        // It has room for the first steps' number, and not for the last.
        (long, "File name too long"),
        #[cfg(target_os = "linux")]
        (PathBuf::from("/proc/state"), ""),
        #[cfg(unix)]
        (socket(&folder), "not a regular file"),
    ] {
        let path = path.to_str().unwrap();
        let arguments = [
            "train", "--device", "host", "--steps", "9999999", "--save", path,
        ];
        let told = refusal(&arguments, 2);
        let expected = format!("error: --save {path}: {reason}");
        assert!(told.starts_with(&expected), "{told}");
    }
    // Looking for a place leaves nothing there, and takes nothing away.
    fs::write(&state, b"old").unwrap();
    let state = state.to_str().unwrap();
    let told = refusal(
        &[
            "train",
            "--device",
            "host",
            "--limit",
            "2MiB",
            "--batch-size",
            "1000",
            "--save",
            state,
        ],
        2,
    );
    assert!(told.contains("--limit"), "{told}");
    assert_eq!(fs::read(state).unwrap(), b"old");
    let hidden = fs::read_dir(&folder).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with('.')
    });
    assert_eq!(hidden.count(), 0);
    fs::remove_dir_all(&folder).unwrap();
}

/// A socket in `folder`: something that is no regular file.
#[cfg(unix)]
fn socket(folder: &Path) -> PathBuf {
    let path = folder.join("socket");
    // The file stays when the socket is closed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    path
}
