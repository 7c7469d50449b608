//! The dashboard and the alerts of `deploy/`: what they ask for is on the page.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::tests::full_page;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(deploy(name)).unwrap()
}

/// Names of metrics in an expression.
fn metrics(expression: &str) -> BTreeSet<&str> {
    expression
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| {
            ["kubeproxy_", "node_dataplane_", "process_"].iter().any(|p| word.starts_with(p))
        })
        .collect()
}

/// All strings under these keys, however deep.
fn strings<'a>(value: &'a Value, keys: &[&str], into: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                into.extend(value.as_str().filter(|_| keys.contains(&key.as_str())));
                strings(value, keys, into);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| strings(value, keys, into)),
        _ => {}
    }
}

#[tokio::test]
async fn dashboard_and_rules_ask_for_nothing_that_is_not_there() {
    let page = full_page().await;
    let there: BTreeSet<&str> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let dashboard: Value = serde_json::from_str(&text("grafana/node-dataplane.json")).unwrap();
    let rules: Value = serde_yaml_ng::from_str(&text("prometheus/rules.yaml")).unwrap();
    for (what, value, least) in [("dashboard", &dashboard, 30), ("rules", &rules, 13)] {
        let mut expressions = Vec::new();
        strings(value, &["expr", "query", "definition"], &mut expressions);
        let asked: BTreeSet<&str> = expressions.iter().flat_map(|e| metrics(e)).collect();
        assert!(asked.len() >= least, "{what}: {asked:?}");
        let missing: Vec<_> = asked.difference(&there).collect();
        assert!(missing.is_empty(), "{what} asks for {missing:?}, which is not on\n{page}");
    }
}

#[test]
fn every_alert_is_described_and_fires() {
    let rules: Value = serde_yaml_ng::from_str(&text("prometheus/rules.yaml")).unwrap();
    let list = rules["groups"][0]["rules"].as_array().unwrap();
    let operate = include_str!("../../../docs/operate.md");
    for rule in list {
        let name = rule["alert"].as_str().unwrap();
        assert!(rule["annotations"]["summary"].is_string(), "{name}");
        assert!(operate.contains(name), "{name} is not in docs/operate.md");
    }
    for arguments in [["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]] {
        let output = Command::new("promtool")
            .args(arguments)
            .current_dir(deploy("prometheus"))
            .output()
            .unwrap_or_else(|error| panic!("promtool: {error}; `cargo xtask setup` installs it"));
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    }
    let fire = format!("value: {}", list.len());
    assert!(text("prometheus/rules.test.yaml").contains(&fire), "not all {fire} are tested");
}
