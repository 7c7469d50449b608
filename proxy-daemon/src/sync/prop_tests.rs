//! Whatever fails and whenever, the next rounds end where no failure would have ended.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::Input;
use super::tests::{Bed, lists, service, slice};
use crate::model::{Change, Event, ObjectName};

#[derive(Debug, Clone)]
enum Step {
    Service(u8, bool),
    Slice(u8, BTreeSet<u8>),
    /// The kernel refuses the operations after this many.
    Refuse(usize, usize),
    /// The answer is lost although the operation took effect.
    LoseAnswer(usize, usize),
    /// The daemon is killed and started again.
    Restart,
    /// A resync begins: it is told of the kernel as it is now, over the next steps.
    Resync,
    /// And ends in the middle.
    FailedResync,
    /// Somebody else takes objects out of the kernel.
    Lose(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..5u8, any::<bool>()).prop_map(|(n, there)| Step::Service(n, there)),
        3 => (1..5u8, proptest::collection::btree_set(1..6u8, 0..4))
            .prop_map(|(n, a)| Step::Slice(n, a)),
        1 => (0..6usize, 1..4usize).prop_map(|(skip, n)| Step::Refuse(skip, n)),
        1 => (0..6usize, 1..4usize).prop_map(|(skip, n)| Step::LoseAnswer(skip, n)),
        1 => Just(Step::Restart),
        2 => Just(Step::Resync),
        1 => Just(Step::FailedResync),
        1 => (0..9usize).prop_map(Step::Lose),
    ]
}

type Api = (BTreeSet<u8>, BTreeMap<u8, BTreeSet<u8>>);

fn relist(api: &Api) -> Vec<Input> {
    let slices = api.1.iter().map(|(n, addresses)| {
        slice(&n.to_string(), &addresses.iter().copied().collect::<Vec<_>>())
    });
    lists(api.0.iter().map(|n| service(&n.to_string(), *n)).collect(), slices.collect())
}

fn run(bed: &mut Bed, api: &mut Api, step: &Step) {
    match step {
        Step::Service(n, true) => {
            api.0.insert(*n);
            let service = service(&n.to_string(), *n);
            bed.step(vec![Input::Object(Event::Services(Change::Applied(service)))]);
        }
        Step::Service(n, false) => {
            api.0.remove(n);
            let name = ObjectName::new("ns", &n.to_string());
            bed.step(vec![Input::Object(Event::Services(Change::Gone(name)))]);
        }
        Step::Slice(n, addresses) => {
            api.1.insert(*n, addresses.clone());
            let list: Vec<u8> = addresses.iter().copied().collect();
            let slice = slice(&n.to_string(), &list);
            bed.step(vec![Input::Object(Event::Slices(Change::Applied(slice)))]);
        }
        Step::Refuse(skip, n) => bed.plane.kernel().refuse = Some((*skip, *n)),
        Step::LoseAnswer(skip, n) => bed.plane.kernel().lose_answer = Some((*skip, *n)),
        Step::Restart => {
            *bed = Bed::on(bed.plane.clone());
            bed.step(relist(api));
        }
        Step::Resync => {
            bed.now += Duration::from_secs(31);
            bed.step(vec![]);
        }
        Step::FailedResync => {
            bed.plane.kernel().unreadable = 1;
            bed.now += Duration::from_secs(31);
            bed.step(vec![]);
        }
        Step::Lose(n) => {
            let mut kernel = bed.plane.kernel();
            let lost = kernel
                .objects
                .keys()
                .min()
                .cloned()
                .into_iter()
                .chain(kernel.objects.keys().nth(*n).cloned());
            for key in lost.collect::<Vec<_>>() {
                kernel.objects.remove(&key);
            }
        }
    }
}

proptest! {
    #[test]
    fn after_any_failures_the_next_rounds_converge(
        steps in proptest::collection::vec(step(), 0..30),
    ) {
        let mut api = Api::default();
        let mut bed = Bed::new();
        bed.step(relist(&api));
        for step in &steps {
            run(&mut bed, &mut api, step);
        }
        {
            let mut kernel = bed.plane.kernel();
            kernel.refuse = None;
            kernel.lose_answer = None;
            kernel.unreadable = 0;
        }
        // Retries, then the drains.
        bed.settle(vec![]);
        for _ in 0..4 {
            bed.now += Duration::from_secs(31);
            bed.settle(vec![]);
        }

        let mut fresh = Bed::new();
        fresh.settle(relist(&api));
        prop_assert_eq!(&bed.plane.kernel().objects, &fresh.plane.kernel().objects);
        let last = bed.seen.last();
        prop_assert_eq!(last.failing_total, 0);
        prop_assert_eq!((last.totals.missing, last.totals.unwanted), (0, 0));
    }

    #[test]
    fn work_follows_the_change_and_not_the_cluster(
        others in 0..200u16,
        before in proptest::collection::btree_set(1..9u8, 0..8),
        after in proptest::collection::btree_set(1..9u8, 0..8),
    ) {
        let mut bed = Bed::new();
        let mut services = vec![service("web", 1)];
        let mut slices = vec![slice("web", &before.iter().copied().collect::<Vec<_>>())];
        for n in 0..others {
            let mut other = service(&format!("other{n}"), 0);
            let [high, low] = n.to_be_bytes();
            other.cluster_ips = vec![[10, 97, high, low].into()];
            services.push(other);
            slices.push(slice(&format!("other{n}"), &[1, 2, 3]));
        }
        bed.settle(lists(services, slices));
        bed.log();
        let changed = slice("web", &after.iter().copied().collect::<Vec<_>>());
        bed.step(vec![Input::Object(Event::Slices(Change::Applied(changed)))]);
        prop_assert_eq!(bed.log().len(), before.symmetric_difference(&after).count());
    }
}
