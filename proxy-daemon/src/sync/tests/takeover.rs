//! What others left in the kernel.

use super::*;
use crate::dataplane::OpError;
use crate::policy::Backend;

fn key(ip: u8) -> FrontendKey {
    let (protocol, port) = (Protocol::Tcp, NonZeroU16::new(80).unwrap());
    FrontendKey { address: [10, 96, 0, ip].into(), protocol, port }
}

/// Of an endpoint that no Service has.
fn stale() -> Backend {
    let port = NonZeroU16::new(8080).unwrap();
    Backend { address: [10, 244, 0, 9].into(), port, local: true, weight: 1 }
}

#[test]
fn foreign_objects_are_left_alone_unless_wanted() {
    let mut bed = Bed::new();
    let stale = stale();
    {
        let mut kernel = bed.plane.kernel();
        for (foreign, value) in
            [(Key::Server(key(1)), 7), (Key::Backend(key(1), stale), 1), (Key::Server(key(9)), 7)]
        {
            kernel.foreign.insert(foreign.clone(), value);
            kernel.objects.insert(foreign, value);
        }
    }
    // The fake reports them as foreign only.
    let ours = std::mem::take(&mut bed.plane.kernel().objects);
    bed.settle(web());
    let log = bed.log();
    assert!(log.contains(&Op::Update(Key::Server(key(1)), 1)), "adopted: {log:?}");
    assert!(log.contains(&Op::Retire(Key::Backend(key(1), stale), 0)), "its leftovers drain");
    assert!(!log.iter().any(|op| *op.key() == Key::Server(key(9))), "not wanted, not touched");
    drop(ours);
}

#[test]
fn what_an_earlier_proxy_left_goes_when_all_that_is_wanted_is_there() {
    let (left, foreign) = (Key::Server(key(8)), Key::Server(key(9)));
    let backend = Key::Backend(key(8), stale());
    let mut bed = Bed::new();
    {
        let mut kernel = bed.plane.kernel();
        kernel.foreign.extend([(left.clone(), 7), (foreign, 7), (backend.clone(), 1)]);
        kernel.left.extend([left.clone(), backend.clone()]);
        // The first operation is refused: until it is repaired nothing is taken away.
        kernel.refuse = Some((0, 1));
    }
    bed.step(web());
    assert_eq!(bed.plane.kernel().takeovers, 0);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().failing_total, 0);
    assert_eq!(bed.plane.kernel().takeovers, 0, "only a full comparison says what is left");
    bed.log();
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    // What is in an unwanted server goes with it: nobody could reach it.
    assert_eq!(bed.log(), [Op::Delete(backend), Op::Delete(left)]);
    assert_eq!(bed.plane.kernel().foreign.len(), 1, "what is not kube-proxy's stays");
}

impl Bed {
    /// Compares so many times: how often what is left had been asked for before each.
    fn takeovers(&mut self) -> [usize; 4] {
        std::array::from_fn(|_| {
            let so_far = self.plane.kernel().takeovers;
            self.now += Duration::from_secs(31);
            self.settle(vec![]);
            so_far
        })
    }
}

fn refused() -> OpError {
    OpError::Refused("EINVAL".into())
}

/// What kube-proxy left, in a kernel that never makes some objects.
fn beside(impossible: impl IntoIterator<Item = Key>, answer: &OpError) -> Bed {
    let left = Key::Server(key(8));
    let bed = Bed::new();
    {
        let mut kernel = bed.plane.kernel();
        kernel.foreign.insert(left.clone(), 7);
        kernel.left.insert(left);
        kernel.impossible = impossible.into_iter().map(|key| (key, answer.clone())).collect();
    }
    bed
}

#[test]
fn what_can_never_be_programmed_does_not_keep_what_an_earlier_proxy_left() {
    let address = Key::Address([10, 96, 0, 1].into());
    let mut bed = beside([address.clone()], &refused());
    bed.settle(web());
    assert_eq!(bed.takeovers(), [0, 0, 1, 2], "from the third comparison on");
    assert_eq!(bed.plane.kernel().foreign.len(), 0);
    assert_eq!(bed.seen.last().failing_total, 1, "it is still named");
    // It was possible for a while: patience begins anew.
    bed.plane.kernel().impossible.clear();
    bed.takeovers();
    assert_eq!(bed.seen.last().failing_total, 0);
    let so_far = bed.plane.kernel().takeovers;
    bed.plane.kernel().objects.remove(&address);
    bed.plane.kernel().impossible.insert(address, refused());
    assert_eq!(bed.takeovers(), [so_far, so_far, so_far, so_far + 1]);
}

#[test]
fn what_the_kernel_does_not_answer_for_may_be_there_yet() {
    let unknown = OpError::Unknown("ETIMEDOUT".into());
    let mut bed = beside([Key::Address([10, 96, 0, 1].into())], &unknown);
    let mut next = bed.step(web());
    // It is compared again and again.
    while bed.plane.kernel().readbacks < 10 {
        bed.now = bed.now.max(next.expect("it does not rest"));
        next = bed.step(vec![]);
    }
    assert_eq!(bed.plane.kernel().takeovers, 0);
}

#[test]
fn where_most_fails_what_an_earlier_proxy_left_stays() {
    let mut all = Bed::new();
    all.settle(web());
    let mut bed = beside(all.keys(), &refused());
    bed.settle(web());
    assert_eq!(bed.takeovers(), [0; 4]);
    assert_eq!(bed.plane.kernel().foreign.len(), 1);
}
