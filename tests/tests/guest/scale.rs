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
