//! What a change costs in ipvs mode, at any number of Services.

use proxy_tests::scale;

use crate::in_namespace;

/// The guest is emulated, so only counts and ratios between sizes mean anything elsewhere.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn an_endpoint_update_is_a_handful_of_requests_however_many_services_there_are() {
    in_namespace(|| {
        let row = scale::measure(&[]);
        println!("{row}");
        let requests = row.requests_of_a_change();
        assert!(requests <= 6.0, "{requests} requests for one change of endpoints");
    });
}

/// As in ebpf mode: with room for all, all are there, and the connections of each.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_scrape_shows_no_more_series_than_it_may() {
    let all = ["--service-metrics-limit=100000", "--endpoint-metrics-limit=1000000"];
    for (arguments, services, endpoints) in [
        (vec!["--service-metrics-limit=10"], 1, 0),
        (all.to_vec(), 300, 0),
        ([&all[..], &["--endpoint-metrics"]].concat(), 300, 3000),
    ] {
        let scrapes = in_namespace(move || scale::scrapes(&arguments));
        println!("{scrapes}");
        assert!(scrapes.service_lines >= services, "{scrapes}");
        assert!(services > 1 || scrapes.service_lines == 1, "all in one: {scrapes}");
        assert!(scrapes.endpoint_lines >= endpoints, "{scrapes}");
        assert!(endpoints > 0 || scrapes.endpoint_lines == 0, "{scrapes}");
    }
}
