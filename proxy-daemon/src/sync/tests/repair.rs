//! What the kernel lost, refused or did not answer.

use super::*;

#[test]
fn a_refused_operation_is_retried_and_named() {
    let mut bed = Bed::new();
    bed.plane.kernel().refuse = Some((1, 1));
    bed.step(web());
    let report = bed.seen.last();
    assert_eq!(report.ops_failed, report.failing_total);
    assert!(report.failing_total > 0 && report.failing[0].error.contains("EINVAL"));
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().failing_total, 0);
    assert_eq!(bed.keys().len(), 4);
}

#[test]
fn a_periodic_resync_repairs_drift() {
    let mut bed = Bed::new();
    bed.settle(web());
    let lost = bed.keys().into_iter().next().unwrap();
    bed.plane.kernel().objects.remove(&lost);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert!(bed.keys().contains(&lost));
}

#[test]
fn what_the_plane_has_put_back_is_repaired_as_well() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.plane.kernel().put_back = 2;
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().totals.repaired, 2);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().totals.repaired, 2, "counted once");
}

#[test]
fn a_change_does_not_wait_for_a_resync_and_is_not_undone_by_it() {
    let mut bed = Bed::new();
    bed.settle(lists(
        (1..40).map(|n| service(&format!("s{n}"), n)).collect(),
        (1..40).map(|n| slice(&format!("s{n}"), &[1, 2])).collect(),
    ));
    bed.log();
    bed.now += Duration::from_secs(31);
    bed.step(vec![]);
    // The readback has told of a few objects by now, as they were when it began.
    let gone = vec![Input::Object(Event::Services(Change::Gone(ObjectName::new("ns", "s7"))))];
    bed.step(gone);
    let deleted = bed.log().len();
    assert_eq!(deleted, 4, "at once: {deleted}");
    let changed = Event::Slices(Change::Applied(slice("s9", &[1, 2, 3])));
    bed.step(vec![Input::Object(changed)]);
    assert_eq!(bed.log().len(), 1);
    assert_eq!(bed.seen.last().kind, SyncKind::Partial);
    bed.settle(vec![]);
    assert_eq!(bed.seen.last().kind, SyncKind::Full);
    assert_eq!(bed.log(), [], "what was read before is older than what was written since");
    assert_eq!(bed.seen.last().totals.repaired, 0);
}

#[test]
fn a_readback_that_fails_is_tried_again_and_changes_go_on() {
    let mut bed = Bed::new();
    bed.settle(web());
    bed.log();
    bed.plane.kernel().unreadable = 2;
    let lost = bed.keys().into_iter().next().unwrap();
    bed.plane.kernel().objects.remove(&lost);
    bed.now += Duration::from_secs(31);
    bed.step(vec![]);
    bed.step(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1, 2, 3]))))]);
    assert_eq!(bed.log().len(), 1);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    bed.now += Duration::from_secs(31);
    bed.settle(vec![]);
    assert!(bed.keys().contains(&lost));
    let totals = bed.seen.last().totals;
    assert_eq!((totals.repaired, totals.missing, totals.unwanted), (1, 0, 0));
}

/// The piece that a failing readback does tell may be of the very object; which it is
/// differs from kernel to kernel here.
#[test]
fn a_retirement_whose_answer_was_lost_keeps_nobody_busy() {
    for _ in 0..20 {
        let mut bed = Bed::new();
        bed.settle(web());
        bed.plane.kernel().busy = bed.keys();
        bed.plane.kernel().lose_answer = Some((0, 1));
        bed.plane.kernel().unreadable = 3;
        bed.settle(vec![Input::Object(Event::Slices(Change::Applied(slice("web", &[1]))))]);
        bed.plane.kernel().busy.clear();
        bed.now += Duration::from_secs(31);
        bed.settle(vec![]);
        assert_eq!(bed.keys().len(), 3, "{:?}", bed.keys());
        assert_eq!(bed.seen.last().failing_total, 0);
    }
}
