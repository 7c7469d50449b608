//! Tables as bytes; exchanging them with the kernel is tested in a guest.

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

/// How a rule ends.
#[derive(Debug, Clone)]
enum Target {
    Verdict(i32),
    Through,
    /// To the user chain of this number, if there are so many.
    Jump(usize),
    /// A target of another kind, with so many bytes.
    Module(usize),
}

#[derive(Debug, Clone)]
struct Model {
    family: Family,
    /// The chains of the hooks, each with a policy besides; then user chains.
    hooks: Vec<Vec<(Vec<u8>, Target)>>,
    users: Vec<Vec<(Vec<u8>, Target)>>,
}

const fn sizes(family: Family) -> (usize, usize) {
    match family {
        Family::V4 => (112, 88),
        Family::V6 => (168, 140),
    }
}

fn entry(family: Family, matches: &[u8], target: &str, data: &[u8]) -> Vec<u8> {
    let (header, offsets) = sizes(family);
    let mut bytes = vec![7; header];
    bytes.extend_from_slice(matches);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let target_offset = bytes.len();
    let size = (32 + data.len()).next_multiple_of(8);
    bytes.extend_from_slice(&u16::try_from(size).unwrap().to_ne_bytes());
    bytes.extend_from_slice(target.as_bytes());
    bytes.resize(target_offset + 32, 0);
    bytes.extend_from_slice(data);
    bytes.resize(target_offset + size, 0);
    for (at, value) in [(offsets, target_offset), (offsets + 2, bytes.len())] {
        bytes[at..at + 2].copy_from_slice(&u16::try_from(value).unwrap().to_ne_bytes());
    }
    bytes
}

fn error(family: Family, name: &str) -> Vec<u8> {
    let mut data = name.as_bytes().to_vec();
    data.resize(30, 0);
    entry(family, &[], "ERROR", &data)
}

fn verdict(family: Family, matches: &[u8], verdict: i32) -> Vec<u8> {
    entry(family, matches, "", &verdict.to_ne_bytes())
}

/// The table as the kernel would show it, made by hand.
fn build(model: &Model) -> (Info, Vec<u8>) {
    let family = model.family;
    let rule = |(matches, target): &(Vec<u8>, Target), at: usize, starts: &[usize]| match target {
        Target::Verdict(number) => verdict(family, matches, *number),
        Target::Module(size) => entry(family, matches, "REJECT", &vec![9; *size]),
        Target::Jump(to) if !starts.is_empty() => {
            verdict(family, matches, i32::try_from(starts[to % starts.len()]).unwrap())
        }
        Target::Through | Target::Jump(_) => {
            let length = verdict(family, matches, 0).len();
            verdict(family, matches, i32::try_from(at + length).unwrap())
        }
    };
    // Lengths do not depend on offsets: the first pass finds where chains begin.
    let mut starts = vec![0; model.users.len()];
    loop {
        let mut blob = Vec::new();
        let mut info = Info::default();
        for (hook, rules) in model.hooks.iter().enumerate() {
            info.valid_hooks |= 1 << hook;
            info.hook_entry[hook] = u32::try_from(blob.len()).unwrap();
            for one in rules {
                let bytes = rule(one, blob.len(), &starts);
                blob.extend(bytes);
                info.entries += 1;
            }
            info.underflow[hook] = u32::try_from(blob.len()).unwrap();
            blob.extend(verdict(family, &[], -2));
            info.entries += 1;
        }
        let before = starts.clone();
        for (number, rules) in model.users.iter().enumerate() {
            blob.extend(error(family, &format!("CHAIN-{number}")));
            starts[number] = blob.len();
            for one in rules {
                let bytes = rule(one, blob.len(), &before);
                blob.extend(bytes);
            }
            blob.extend(verdict(family, &[], -5));
            info.entries += u32::try_from(2 + rules.len()).unwrap();
        }
        blob.extend(error(family, "ERROR"));
        info.entries += 1;
        info.size = u32::try_from(blob.len()).unwrap();
        if before == starts {
            return (info, blob);
        }
    }
}

fn rules() -> impl Strategy<Value = Vec<(Vec<u8>, Target)>> {
    let target = prop_oneof![
        (-5..0_i32).prop_map(Target::Verdict),
        Just(Target::Through),
        any::<usize>().prop_map(Target::Jump),
        (0..20_usize).prop_map(Target::Module),
    ];
    vec((vec(any::<u8>(), 0..40), target), 0..6)
}

fn models() -> impl Strategy<Value = Model> {
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    (family, vec(rules(), 1..=HOOKS), vec(rules(), 0..6)).prop_map(|(family, hooks, users)| Model {
        family,
        hooks,
        users,
    })
}

/// Each rule that is left: its chain, its bytes but for an offset, and where it leads.
fn described(table: &Table) -> Vec<String> {
    let (_, offsets) = sizes(table.family);
    let chain = |(at, chain): (usize, &Chain)| {
        let name = chain.name().map_or_else(|| format!("hook chain {at}"), str::to_owned);
        let (_, blob) = table.write().unwrap();
        assert!(!blob.is_empty());
        chain
            .rules
            .iter()
            .map(|rule| format!("{name}: {:?} {:?}", rule.jump(), without_offset(rule, offsets)))
            .collect::<Vec<_>>()
    };
    table.chains.iter().enumerate().flat_map(chain).collect()
}

fn without_offset(rule: &Rule, offsets: usize) -> Vec<u8> {
    let mut bytes = rule.bytes().to_vec();
    let target = usize::from(u16::from_ne_bytes([bytes[offsets], bytes[offsets + 1]]));
    if bytes[target + 2] == 0 && bytes[target + 35] < 128 {
        bytes[target + 32..target + 36].fill(0);
    }
    bytes
}

proptest! {
    #[test]
    fn a_table_is_written_as_it_was_read(model in models()) {
        let (info, blob) = build(&model);
        let table = Table::parse(model.family, info, &blob).unwrap();
        prop_assert_eq!(table.write().unwrap(), (info, blob));
        let entries = usize::try_from(info.entries).unwrap();
        prop_assert_eq!(table.numbers(), (0..entries).collect::<Vec<_>>());
    }

    /// What is left is as it was, jumps lead where they led, and the result is a table.
    #[test]
    fn removing_leaves_all_other_rules_as_they_are(
        model in models(),
        which in any::<u64>(),
        removed in vec((0..12_usize, 0..8_usize), 0..12),
    ) {
        let (info, blob) = build(&model);
        let before = Table::parse(model.family, info, &blob).unwrap();
        let gone = |name: &str| {
            let number: u32 = name.trim_start_matches("CHAIN-").parse().unwrap();
            which & (1 << number) != 0
        };
        let chains: std::collections::BTreeSet<String> =
            before.chains.iter().filter_map(Chain::name).filter(|n| gone(n)).map(str::to_owned).collect();
        let mut rules: std::collections::BTreeSet<(usize, usize)> = removed.into_iter().collect();
        // No jump may be left over to a chain that goes.
        for (at, chain) in before.chains.iter().enumerate() {
            for (position, rule) in chain.rules.iter().enumerate() {
                if rule.jump().is_some_and(|to| chains.contains(to)) {
                    rules.insert((at, position));
                }
            }
        }
        let mut after = before.clone();
        after.remove(&chains, &rules);
        let (new_info, new_blob) = after.write().unwrap();
        let again = Table::parse(model.family, new_info, &new_blob).unwrap();
        prop_assert_eq!(again.write().unwrap(), (new_info, new_blob));
        prop_assert_eq!(described(&again), described(&after));

        let all = described(&before);
        let mut expected = Vec::new();
        let mut index = 0;
        for (at, chain) in before.chains.iter().enumerate() {
            for position in 0..chain.rules.len() {
                let policy = position + 1 == chain.rules.len();
                let stays = (policy || !rules.contains(&(at, position)))
                    && chain.name().is_none_or(|name| !chains.contains(name));
                if stays {
                    expected.push(all[index].clone());
                }
                index += 1;
            }
        }
        prop_assert_eq!(described(&after), expected);
        prop_assert_eq!(after.numbers().len(), usize::try_from(new_info.entries).unwrap());
    }

    #[test]
    fn arbitrary_bytes_are_a_table_or_are_rejected(
        blob in vec(any::<u8>(), 0..600),
        hooks in 0..32_u32,
        entries in 0..4_u32,
    ) {
        for family in Family::ALL {
            let size = u32::try_from(blob.len()).unwrap();
            let info = Info { valid_hooks: hooks, entries, size, ..Info::default() };
            let _ = Table::parse(family, info, &blob);
        }
    }

    /// Bytes that are almost right go deeper than arbitrary ones.
    #[test]
    fn damaged_tables_are_read_or_rejected(
        model in models(),
        damage in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<proptest::sample::Index>(),
        shorten in any::<bool>(),
        hook in 0..HOOKS,
        entry in any::<u32>(),
    ) {
        let (mut info, mut blob) = build(&model);
        for (position, value) in damage {
            let position = position.index(blob.len());
            blob[position] = value;
        }
        if shorten {
            blob.truncate(cut.index(blob.len() + 1));
            info.size = u32::try_from(blob.len()).unwrap();
            info.hook_entry[hook] = entry;
        }
        if let Ok(mut table) = Table::parse(model.family, info, &blob) {
            let _ = table.write();
            table.remove(&["CHAIN-0".to_owned()].into(), &[(0, 0), (1, 1)].into());
            let _ = table.write();
            prop_assert!(table.numbers().len() <= usize::try_from(info.entries).unwrap());
        }
    }
}

fn example() -> Model {
    Model {
        family: Family::V4,
        hooks: vec![vec![
            (vec![1], Target::Jump(0)),
            (vec![2], Target::Jump(1)),
            (vec![3], Target::Through),
        ]],
        users: vec![vec![(vec![4], Target::Jump(1))], vec![(vec![5], Target::Verdict(-2))]],
    }
}

#[test]
fn the_first_rule_of_a_hook_can_go() {
    let (info, blob) = build(&example());
    let mut table = Table::parse(Family::V4, info, &blob).unwrap();
    table.remove(&["CHAIN-0".to_owned()].into(), &[(0, 0)].into());
    let (new_info, new_blob) = table.write().unwrap();
    assert_eq!(new_info.hook_entry[0], 0);
    let rule = info.underflow[0] / 3;
    assert_eq!(new_info.underflow[0], rule * 2);
    // The chain's head, its rule and its end are gone, and the rule that led there.
    assert_eq!(new_info.entries, info.entries - 4);
    let jump = Table::parse(Family::V4, new_info, &new_blob).unwrap();
    assert_eq!(jump.chains[0].rules[0].jump(), Some("CHAIN-1"));
}

#[test]
fn a_jump_to_nowhere_is_not_written() {
    let (info, blob) = build(&example());
    let mut table = Table::parse(Family::V4, info, &blob).unwrap();
    table.remove(&["CHAIN-1".to_owned()].into(), &[].into());
    let error = table.write().unwrap_err();
    assert_eq!(error, Malformed("a rule jumps to a chain that is not there"));
}

#[test]
fn a_policy_to_drop_is_seen_and_stays() {
    let (info, mut blob) = build(&example());
    let at = usize::try_from(info.underflow[0]).unwrap();
    let mut table = Table::parse(Family::V4, info, &blob).unwrap();
    assert!(!table.chains[0].drops(Family::V4));
    table.remove(&[].into(), &[(0, 0), (0, 1), (0, 2), (0, 3)].into());
    assert_eq!(table.chains[0].rules.len(), 1);
    blob[at + 112 + 32..at + 112 + 36].copy_from_slice(&(-1_i32).to_ne_bytes());
    assert!(Table::parse(Family::V4, info, &blob).unwrap().chains[0].drops(Family::V4));
}

/// A legacy iptables that nobody has used is not even looked at.
#[test]
fn tables_that_do_not_exist_are_not_named() {
    let directory = tempfile::tempdir().unwrap();
    let lock = directory.path().join("lock");
    let mut sockets = XTablesSockets::open(directory.path(), &lock).unwrap();
    assert!(sockets.tables(Family::V4).unwrap().is_empty());
    std::fs::write(directory.path().join("ip6_tables_names"), "nat\nfilter\n").unwrap();
    assert_eq!(sockets.tables(Family::V6).unwrap(), ["nat", "filter"]);
}
