//! Documents that must agree with the code.

/// What each file of the code draws, as `docs/formats.md` must draw it.
const DRAWN: [(&str, &str); 9] = [
    ("envelope", include_str!("../../cloud/src/envelope.rs")),
    ("batch", include_str!("../../shared/src/batch.rs")),
    ("edge database", include_str!("../../edge/src/redb_log/tables.rs")),
    ("link", include_str!("../../shared/src/link/frame.rs")),
    ("block", include_str!("../../cloud/src/block.rs")),
    ("state", include_str!("../../cloud/src/state.rs")),
    ("local log", include_str!("../../cloud/src/wal/file.rs")),
    ("archive", include_str!("../../cloud/src/manifest.rs")),
    ("segment", include_str!("../../cloud/src/segment.rs")),
];

fn boxes(source: &str) -> String {
    let inner: Vec<&str> = source.lines().skip_while(|line| *line != "//! ```text").skip(1).collect();
    let lines = inner.iter().take_while(|line| **line != "//! ```");
    lines.map(|line| line.trim_start_matches("//!").strip_prefix(' ').unwrap_or("")).collect::<Vec<_>>().join("\n")
}

#[test]
fn formats_are_drawn_as_in_the_code() {
    let guide = include_str!("../../docs/formats.md");
    for (name, source) in DRAWN {
        let drawn = boxes(source);
        assert!(drawn.lines().count() > 3, "{name}: no box found");
        assert!(guide.contains(&drawn), "docs/formats.md draws {name} differently:\n{drawn}");
    }
}

/// The string literals of a source file that begin with `prefix`.
fn literals<'a>(source: &'a str, prefix: &str) -> Vec<&'a str> {
    source.split('"').filter(|text| text.starts_with(prefix) && !text.contains([' ', '{'])).collect()
}

#[test]
fn every_metric_is_in_the_operating_guide_and_the_other_way_round() {
    let guide = include_str!("../../docs/operating.md");
    let edge = literals(include_str!("../../edge/src/admin.rs"), "tributary_edge_");
    let cloud = literals(include_str!("../../cloud/src/admin.rs"), "tributary_cloud_");
    let served: Vec<&str> = edge.into_iter().chain(cloud).collect();
    assert!(served.len() > 40, "{served:?}");
    for name in &served {
        let told = guide.contains(&format!("`{name}`")) || guide.contains(&format!("`{name}_total`"));
        assert!(told, "docs/operating.md lacks {name}");
    }
    for told in guide.split('`').filter(|text| text.starts_with("tributary_")) {
        let name = told.strip_suffix("_total").unwrap_or(told);
        assert!(served.contains(&name), "docs/operating.md tells of {told}, which is not served");
    }
}
