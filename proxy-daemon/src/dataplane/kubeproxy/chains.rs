//! Which chains and rules go, decided on names and jumps. Pure, and the same for both
//! backends of iptables.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::names::{FORWARD, is_chain, is_entry};

/// A chain of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View<R> {
    pub name: String,
    /// Attached to a hook: a built-in chain of iptables.
    pub base: bool,
    /// Its policy is to drop.
    pub drops: bool,
    /// Each with what names it, and the chains it leads to.
    pub rules: Vec<(R, Vec<String>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal<R> {
    /// Rules of built-in chains.
    pub rules: Vec<(String, R)>,
    pub chains: BTreeSet<String>,
    /// Chains that stay, and why.
    pub kept: BTreeMap<String, &'static str>,
}

/// What to leave although it is kube-proxy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarding {
    /// `KUBE-FORWARD` where the policy is to drop: it is what lets replies of endpoints
    /// pass, and nothing takes its place.
    Keep,
    Remove,
}

const IN_USE: &str = "a rule that is not kube-proxy's leads to it";
const POLICY: &str = "the policy of the chain that jumps to it is to drop";

/// `held` are chains that the kernel did not give away, for reasons that rules do not
/// show.
#[must_use]
pub fn plan<R: Clone>(
    chains: &[View<R>],
    forwarding: Forwarding,
    held: &BTreeSet<String>,
) -> Removal<R> {
    let candidates: BTreeMap<&str, &View<R>> = chains
        .iter()
        .filter(|chain| !chain.base && is_chain(&chain.name))
        .map(|chain| (chain.name.as_str(), chain))
        .collect();
    let mut rules = Vec::new();
    let mut queue: VecDeque<(&str, &'static str)> =
        held.iter().map(|chain| (chain.as_str(), IN_USE)).collect();
    for chain in chains {
        if candidates.contains_key(chain.name.as_str()) && !chain.base {
            continue;
        }
        for (rule, jumps) in &chain.rules {
            let needed = forwarding == Forwarding::Keep
                && chain.drops
                && jumps.iter().any(|to| to == FORWARD);
            let entry = |to: &String| is_entry(to) && candidates.contains_key(to.as_str());
            if chain.base && !needed && jumps.iter().any(entry) {
                rules.push((chain.name.clone(), rule.clone()));
            } else {
                let why = if needed { POLICY } else { IN_USE };
                queue.extend(jumps.iter().map(|to| (to.as_str(), why)));
            }
        }
    }
    let mut kept: BTreeMap<String, &'static str> = BTreeMap::new();
    while let Some((name, why)) = queue.pop_front() {
        let Some(chain) = candidates.get(name) else { continue };
        if kept.contains_key(name) {
            continue;
        }
        kept.insert(name.to_owned(), why);
        queue.extend(chain.rules.iter().flat_map(|(_, jumps)| jumps).map(|to| (to.as_str(), why)));
    }
    let chains = candidates
        .keys()
        .filter(|name| !kept.contains_key(**name))
        .map(|name| (*name).to_owned())
        .collect();
    Removal { rules, chains, kept }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_assert, proptest};

    use super::*;

    fn chain(name: &str, base: bool, jumps: &[&str]) -> View<usize> {
        let rules = jumps
            .iter()
            .enumerate()
            .map(|(at, to)| (at, if to.is_empty() { Vec::new() } else { vec![(*to).to_owned()] }));
        View { name: name.to_owned(), base, drops: false, rules: rules.collect() }
    }

    fn removed(chains: &[View<usize>]) -> Removal<usize> {
        plan(chains, Forwarding::Keep, &BTreeSet::new())
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn chains_and_the_rules_that_lead_to_them_go() {
        let plan = removed(&[
            chain("INPUT", true, &["KUBE-IPVS-FILTER", "", "KUBE-FIREWALL", "MINE"]),
            chain("KUBE-IPVS-FILTER", false, &["", ""]),
            chain("KUBE-FIREWALL", false, &[""]),
            chain("MINE", false, &[]),
        ]);
        assert_eq!(plan.rules, [("INPUT".to_owned(), 0)]);
        assert_eq!(plan.chains, names(&["KUBE-IPVS-FILTER"]));
        assert!(plan.kept.is_empty());
    }

    #[test]
    fn a_chain_that_foreign_rules_use_stays_with_what_it_needs() {
        let plan = removed(&[
            chain("PREROUTING", true, &["KUBE-SERVICES", "CNI-HOSTPORT"]),
            chain("CNI-HOSTPORT", false, &["KUBE-LOAD-BALANCER"]),
            chain("KUBE-SERVICES", false, &["KUBE-LOAD-BALANCER", "KUBE-NODE-PORT"]),
            chain("KUBE-LOAD-BALANCER", false, &["KUBE-MARK-MASQ"]),
            chain("KUBE-NODE-PORT", false, &[]),
            chain("KUBE-MARK-MASQ", false, &[""]),
        ]);
        assert_eq!(plan.rules, [("PREROUTING".to_owned(), 0)]);
        assert_eq!(plan.chains, names(&["KUBE-SERVICES", "KUBE-NODE-PORT"]));
        assert_eq!(plan.kept.len(), 2);
    }

    #[test]
    fn a_built_in_chain_that_leads_to_an_inner_chain_is_not_kube_proxys_doing() {
        let plan = removed(&[
            chain("OUTPUT", true, &["KUBE-MARK-MASQ"]),
            chain("KUBE-MARK-MASQ", false, &[""]),
        ]);
        assert!(plan.rules.is_empty() && plan.chains.is_empty());
    }

    #[test]
    fn what_accepts_forwarded_packets_stays_where_the_policy_is_to_drop() {
        let forward = View { drops: true, ..chain("FORWARD", true, &["KUBE-FORWARD"]) };
        let chains = [forward, chain("KUBE-FORWARD", false, &["", ""])];
        let plan = removed(&chains);
        assert!(plan.rules.is_empty() && plan.chains.is_empty());
        assert_eq!(plan.kept["KUBE-FORWARD"], POLICY);
        let whole = super::plan(&chains, Forwarding::Remove, &BTreeSet::new());
        assert_eq!((whole.rules.len(), whole.chains.len()), (1, 1));
    }

    #[test]
    fn what_the_kernel_holds_stays_with_what_it_needs() {
        let chains = [
            chain("KUBE-NODE-PORT", false, &["KUBE-MARK-MASQ"]),
            chain("KUBE-MARK-MASQ", false, &[""]),
            chain("KUBE-SERVICES", false, &["KUBE-NODE-PORT"]),
        ];
        let plan = super::plan(&chains, Forwarding::Keep, &names(&["KUBE-NODE-PORT"]));
        assert_eq!(plan.chains, names(&["KUBE-SERVICES"]));
    }

    fn tables() -> impl Strategy<Value = Vec<View<usize>>> {
        const NAMES: [&str; 8] = [
            "KUBE-SERVICES",
            "KUBE-FORWARD",
            "KUBE-MARK-MASQ",
            "KUBE-NODE-PORT",
            "KUBE-FIREWALL",
            "MINE",
            "INPUT",
            "FORWARD",
        ];
        vec((vec(0..NAMES.len(), 0..5), any::<bool>()), NAMES.len()).prop_map(|chains| {
            let view = |(at, (jumps, drops)): (usize, (Vec<usize>, bool))| {
                let base = at >= 6;
                let jumps: Vec<&str> = jumps
                    .into_iter()
                    .map(|to| NAMES.get(to).filter(|_| to < 6).copied().unwrap_or(""))
                    .collect();
                View { drops: drops && base, ..chain(NAMES[at], base, &jumps) }
            };
            chains.into_iter().enumerate().map(view).collect()
        })
    }

    proptest! {
        /// The kernel would refuse the whole otherwise; and nothing foreign is touched.
        #[test]
        fn nothing_that_stays_leads_to_what_goes(chains in tables()) {
            let plan = removed(&chains);
            for chain in chains.iter().filter(|chain| !plan.chains.contains(&chain.name)) {
                for (rule, jumps) in &chain.rules {
                    let goes = plan.rules.contains(&(chain.name.clone(), *rule));
                    prop_assert!(goes || jumps.iter().all(|to| !plan.chains.contains(to)));
                    prop_assert!(!goes || (chain.base && jumps.iter().all(|to| is_entry(to))));
                }
            }
            prop_assert!(plan.chains.iter().all(|name| is_chain(name)));
        }
    }
}
