//! From the start of the daemon to the end of its first full round, and engines that hang.

use super::*;

/// Between two looks.
const MOMENT: Duration = Duration::from_millis(1);

async fn codes(bed: &Bed) -> (u16, u16) {
    (bed.healthz().await.code, bed.livez().await.code)
}

#[tokio::test]
async fn not_fit_for_traffic_until_everything_is_listed_and_programmed() {
    let mut bed = Bed::starting(&[]);
    // However long it takes: nothing is gained by ending a daemon that waits.
    bed.at(3_600_000);
    assert_eq!(codes(&bed).await, (503, 200), "its data plane is being made");
    let start = bed.start;
    bed.observer.awaiting(&["the Node", "the list of Services"], start);
    bed.observer.node(Some(true));
    bed.queued(3_600_000, 2, 0);
    bed.at(7_200_000);
    let reply = bed.healthz().await;
    assert_eq!(reply.code, 503);
    assert_eq!(
        reply.body,
        concat!(
            r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-11-21T11:00:00Z","#,
            r#""nodeEligible":true,"healthy":false,"status":{"#,
            r#""IPv4":{"lastUpdated":"0001-01-01T00:00:00Z","healthy":false},"#,
            r#""IPv6":{"lastUpdated":"0001-01-01T00:00:00Z","healthy":false}}}"#
        )
    );
    assert_eq!(bed.livez().await.code, 200, "what cannot be programmed yet is not late");
    let awaited = bed.status.health().awaits();
    assert_eq!(awaited.as_deref(), Some("the Node, the list of Services"));

    // Rounds of only a part of the Services.
    let listed = bed.at(7_201_000);
    bed.observer.awaiting(&[], listed);
    bed.synced(7_202_000, |report| report.pending = 2);
    bed.synced(7_203_000, |_| {});
    assert_eq!(codes(&bed).await, (503, 200), "not all was compared with the kernel");
    bed.synced(7_204_000, |report| report.kind = SyncKind::Full);
    assert_eq!(codes(&bed).await, (200, 200));
    assert_eq!(bed.status.health().awaits(), None);
}

#[tokio::test]
async fn what_is_not_programmed_long_after_the_lists_is_late() {
    let mut bed = Bed::starting(&[]);
    let start = bed.start;
    bed.observer.awaiting(&["the list of EndpointSlices"], start);
    bed.queued(0, 1, 0);
    let listed = bed.at(500_000);
    bed.observer.awaiting(&[], listed);
    bed.at(559_999);
    assert_eq!(codes(&bed).await, (503, 200));
    bed.at(560_000);
    assert_eq!(codes(&bed).await, (503, 503));
}

/// One refused object does not keep a node away from its other Services' traffic for longer than
/// such objects ever do.
#[tokio::test]
async fn an_object_that_fails_does_not_keep_the_daemon_from_service() {
    let mut bed = Bed::starting(&[]);
    let since = bed.at(1_000);
    bed.observer.awaiting(&[], since);
    bed.synced(2_000, |report| {
        failing_since(since)(report);
        report.kind = SyncKind::Full;
    });
    assert_eq!(codes(&bed).await, (200, 200));
}

#[tokio::test]
async fn what_is_waited_for_is_said_until_it_came() {
    let mut bed = Bed::starting(&[]);
    let remind = tokio::spawn({
        let status = Arc::clone(&bed.status);
        async move { remind(&status, MOMENT).await }
    });
    tokio::time::sleep(30 * MOMENT).await;
    assert!(!remind.is_finished());
    bed.synced(1_000, |report| report.kind = SyncKind::Full);
    until(async || remind.is_finished()).await;
}

#[tokio::test]
async fn an_engine_that_does_not_come_back_ends_the_daemon_and_failing_objects_do_not() {
    let mut bed = Bed::new();
    let stuck = tokio::spawn(stuck(Arc::clone(&bed.status), MOMENT));
    let since = bed.at(0);
    bed.synced(60_000, failing_since(since));
    bed.at(7_200_000);
    tokio::time::sleep(30 * MOMENT).await;
    assert_eq!(bed.livez().await.code, 503);
    assert!(!stuck.is_finished() && !bed.status.is_stuck(), "a restart frees no room in a map");

    let began = bed.at(7_200_000);
    bed.observer.busy(Some(began));
    bed.at(7_499_000);
    tokio::time::sleep(30 * MOMENT).await;
    assert!(!stuck.is_finished(), "long, but it may yet come back");
    bed.observer.busy(None);
    bed.at(9_000_000);
    tokio::time::sleep(30 * MOMENT).await;
    assert!(!stuck.is_finished(), "it is at rest");

    let began = bed.at(9_000_000);
    bed.observer.busy(Some(began));
    bed.at(9_301_000);
    let ended = tokio::time::timeout(Duration::from_secs(10), stuck).await;
    let reason = ended.expect("it ends").unwrap();
    assert!(reason.contains("for 301 s"), "{reason}");
    assert!(bed.status.is_stuck());
}
