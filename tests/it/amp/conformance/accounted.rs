//! That no number is left out.

use std::collections::BTreeMap;

const SOURCES: [&str; 13] = [
    include_str!("autocast.rs"),
    include_str!("capture.rs"),
    include_str!("clip.rs"),
    include_str!("fp8.rs"),
    include_str!("gradients.rs"),
    include_str!("order.rs"),
    include_str!("peers.rs"),
    include_str!("precision.rs"),
    include_str!("scale.rs"),
    include_str!("several.rs"),
    include_str!("steps.rs"),
    include_str!("training.rs"),
    include_str!("update.rs"),
];

#[test]
fn every_case_is_there_once() {
    let mut found = BTreeMap::new();
    for source in SOURCES {
        for (start, _) in source.match_indices("\nfn case_") {
            let name = source[start + "\nfn case_".len()..]
                .split('(')
                .next()
                .unwrap();
            let number = name.split('_').next().unwrap().to_owned();
            assert!(source[..start].ends_with("#[test]"), "{name} runs");
            *found.entry(number).or_insert(0) += 1;
        }
    }
    let mut expected: Vec<String> = (1..=74).map(|number| format!("{number:02}")).collect();
    expected.push("51a".to_owned());
    assert_eq!(expected.len(), 75);
    for number in &expected {
        assert_eq!(found.remove(number), Some(1), "case {number}");
    }
    assert!(found.is_empty(), "{found:?}");
}
