//! Manual page and shell completions, made from the flags and kept in `deploy/`. These tests
//! find them out of date; `cargo xtask generate` makes them again.

use std::path::Path;

use clap_complete::Shell;

use super::command;

fn check(file: &str, content: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    if std::env::var_os("PROXY_UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
    }
    let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    assert!(kept == content, "{file} is out of date: `cargo xtask generate` makes it again");
}

#[test]
fn the_manual_page_is_that_of_the_flags() {
    let text = page(command());
    for part in
        [".TH proxy-daemon 8", "\\-\\-ipvs\\-scheduler", "\\-\\-feature\\-gates", "Examples"]
    {
        assert!(text.contains(part), "{part}");
    }
    check("man/proxy-daemon.8", text.as_bytes());
}

#[test]
fn the_subcommands_have_manual_pages() {
    let mut command = command();
    command.build();
    let config = command.find_subcommand("config").unwrap().clone();
    let check_file = config.find_subcommand("check").unwrap().clone();
    let name = "proxy-daemon-config";
    check("man/proxy-daemon-config.8", page(config.name(name).display_name(name)).as_bytes());
    let name = "proxy-daemon-config-check";
    let text = page(check_file.name(name).display_name(name));
    assert!(text.contains("\\-\\-strict"), "{text}");
    check("man/proxy-daemon-config-check.8", text.as_bytes());
}

fn page(command: clap::Command) -> String {
    let mut page = Vec::new();
    // The date would make every build differ.
    let man = clap_mangen::Man::new(command).date("").section("8");
    man.manual("System administration").render(&mut page).unwrap();
    String::from_utf8(page).unwrap()
}

#[test]
fn shell_completions_are_those_of_the_flags() {
    for (shell, file) in [
        (Shell::Bash, "completions/proxy-daemon.bash"),
        (Shell::Zsh, "completions/_proxy-daemon"),
        (Shell::Fish, "completions/proxy-daemon.fish"),
    ] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command(), "proxy-daemon", &mut script);
        let text = String::from_utf8_lossy(&script);
        assert!(text.contains("ipvs-scheduler") && text.contains("check"), "{shell}");
        check(file, &script);
    }
}

/// systemd itself reads the unit, with another program in place of ours.
#[test]
fn the_systemd_unit_is_understood_and_runs_a_command_line_that_is_accepted() {
    let unit = include_str!("../../../deploy/systemd/node-dataplane.service");
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    assert_eq!(command, "/usr/bin/proxy-daemon $OPTIONS");
    let example =
        unit.lines().find_map(|line| line.trim_start_matches("#   ").strip_prefix("OPTIONS="));
    let arguments = std::iter::once("proxy-daemon").chain(example.unwrap().split(' '));
    let config = super::Config::from_args(arguments, "a").unwrap();
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node-dataplane.service");
    std::fs::write(&path, unit.replace("/usr/bin/proxy-daemon", "/bin/true")).unwrap();
    let verify = std::process::Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&path)
        .output();
    match verify {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let about: Vec<_> =
                said.lines().filter(|line| line.contains("node-dataplane.service")).collect();
            assert!(about.is_empty(), "{about:#?}");
        }
        Err(error) => eprintln!("the unit is NOT VERIFIED: systemd-analyze: {error}"),
    }
}
