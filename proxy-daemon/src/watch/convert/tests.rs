//! One test per rule of what a Service means, named after it; then everything a real
//! API server answered; then anything at all.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{EndpointSlice, Family, Node, Service, TrafficPolicy};
use crate::watch::wire;

/// A ClusterIP Service with `spec` merged over its own.
fn make_service(labels: Value, spec: Value, status: Value) -> wire::Service {
    let mut object = json!({
        "metadata": {"name": "web", "namespace": "shop", "labels": labels,
                     "creationTimestamp": "2026-11-21T08:36:27Z"},
        "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
                 "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        "status": status,
    });
    let Value::Object(spec) = spec else { panic!("spec must be an object") };
    for (key, value) in spec {
        object["spec"][key] = value;
    }
    serde_json::from_value(object).expect("a Service")
}

fn convert(spec: Value, status: Value) -> (Service, Vec<String>) {
    ours(service(&make_service(json!({}), spec, status)))
}

fn spec(spec: Value) -> (Service, Vec<String>) {
    convert(spec, json!({}))
}

fn ours<T: fmt::Debug>(converted: Converted<T>) -> (T, Vec<String>) {
    match converted {
        Converted::Ours(object, complaints) => {
            (object, complaints.iter().map(ToString::to_string).collect())
        }
        other => panic!("not converted: {other:?}"),
    }
}

fn make_slice(patch: Value) -> wire::EndpointSlice {
    let mut object = json!({
        "metadata": {"name": "web-1", "namespace": "shop",
                     "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.0.7"]}],
    });
    let Value::Object(patch) = patch else { panic!("patch must be an object") };
    for (key, value) in patch {
        object[key] = value;
    }
    serde_json::from_value(object).expect("an EndpointSlice")
}

fn patched_slice(patch: Value) -> (EndpointSlice, Vec<String>) {
    ours(slice(&make_slice(patch)))
}

fn addresses(text: &[&str]) -> Vec<IpAddr> {
    text.iter().map(|text| text.parse().expect("an address")).collect()
}

#[test]
fn services_labelled_headless_or_with_a_proxy_name_are_not_ours() {
    for label in [LABEL_HEADLESS, LABEL_PROXY_NAME] {
        // Any value counts, the empty one too: the selector is "exists".
        for value in ["", "other"] {
            let object = make_service(json!({label: value}), json!({}), json!({}));
            assert!(matches!(service(&object), Converted::NotOurs(_)), "{label}={value}");
        }
    }
}

#[test]
fn cluster_ip_none_or_empty_and_external_name_program_nothing() {
    for patch in [
        json!({"clusterIP": "None", "clusterIPs": ["None"]}),
        json!({"clusterIP": "", "clusterIPs": []}),
        json!({"clusterIP": null, "clusterIPs": null}),
        json!({"clusterIP": "None", "clusterIPs": null}),
        json!({"type": "ExternalName", "externalName": "example.com"}),
    ] {
        let object = make_service(json!({}), patch.clone(), json!({}));
        assert!(matches!(service(&object), Converted::NotOurs(_)), "{patch}");
    }
    let no_spec = wire::Service { spec: None, ..make_service(json!({}), json!({}), json!({})) };
    assert!(matches!(service(&no_spec), Converted::NotOurs(_)));
}

#[test]
fn a_service_without_a_usable_cluster_ip_is_rejected_with_the_field_named() {
    let object = make_service(json!({}), json!({"clusterIPs": ["10.96.0.300"]}), json!({}));
    let Converted::Rejected(rejected) = service(&object) else { panic!("not rejected") };
    assert_eq!(rejected.name.to_string(), "shop/web");
    assert_eq!(rejected.reason, "spec.clusterIPs[0]: \"10.96.0.300\" is not an IP address");
}

#[test]
fn an_object_without_a_name_is_rejected() {
    let mut object = make_service(json!({}), json!({}), json!({}));
    object.metadata.name = None;
    let Converted::Rejected(rejected) = service(&object) else { panic!("not rejected") };
    assert_eq!(rejected.reason, "metadata.name is missing");
}

#[test]
fn cluster_ips_are_taken_one_per_family() {
    let (both, complaints) = spec(json!({"clusterIPs": ["10.96.0.10", "fd00::10"]}));
    assert_eq!(both.cluster_ips, addresses(&["10.96.0.10", "fd00::10"]));
    assert_eq!(complaints, Vec::<String>::new());
    let (single, _) = spec(json!({"clusterIP": "10.96.0.11", "clusterIPs": null}));
    assert_eq!(single.cluster_ips, addresses(&["10.96.0.11"]));
    let (first, complaints) = spec(json!({"clusterIPs": ["10.96.0.10", "10.96.0.11"]}));
    assert_eq!(first.cluster_ips, addresses(&["10.96.0.10"]));
    assert_eq!(complaints.len(), 1, "{complaints:?}");
}

#[test]
fn addresses_are_taken_as_sloppily_as_the_api_took_them() {
    assert_eq!(ip("010.096.000.010"), Ok("10.96.0.10".parse().expect("address")));
    assert_eq!(ip("::ffff:10.0.0.1"), Ok("10.0.0.1".parse().expect("address")));
    for wrong in ["", "10.0.0", "10.0.0.1.2", "10.0.0.+1", "10.0.0.256", "fe80::1%eth0", "a.b.c.d"]
    {
        assert!(ip(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn ip_mode_proxy_is_not_programmed_absent_or_vip_is() {
    let (service, complaints) = convert(
        json!({"type": "LoadBalancer"}),
        json!({"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1"},
            {"ip": "203.0.113.2", "ipMode": "VIP"},
            {"ip": "203.0.113.3", "ipMode": "Proxy"},
            {"hostname": "lb.example.com"},
            {"ip": "2001:db8::1"},
        ]}}),
    );
    // The last one is of a family that the Service has no cluster IP of.
    assert_eq!(service.load_balancer_ips, addresses(&["203.0.113.1", "203.0.113.2"]));
    assert_eq!(complaints, Vec::<String>::new());
}

#[test]
fn external_ips_are_filtered_per_family_and_by_use() {
    let (service, complaints) = spec(json!({"externalIPs":
        ["198.51.100.7", "198.51.100.7", "2001:db8::7", "127.0.0.1", "0.0.0.0", "x"]}));
    assert_eq!(service.external_ips, addresses(&["198.51.100.7"]));
    assert_eq!(complaints.len(), 4, "{complaints:?}");
    assert_eq!(
        complaints[0],
        "spec.externalIPs[2]: 2001:db8::7 is IPv6, and the Service has no cluster IP of that family"
    );
}

#[test]
fn source_ranges_are_trimmed_and_unparsable_ones_left_out() {
    let (service, complaints) = spec(json!({"loadBalancerSourceRanges":
        ["203.0.113.7/24", " 2001:db8::/32", "10.0.0.1", "10.0.0.0/33", "10.0.0.0/+8"]}));
    let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["203.0.113.0/24", "2001:db8::/32"]);
    assert_eq!(complaints.len(), 3, "{complaints:?}");
}

#[test]
fn a_zero_prefix_range_means_all_of_its_family() {
    let (service, complaints) = spec(json!({"loadBalancerSourceRanges":
        ["203.0.113.0/24", "0.0.0.0/0", "2001:db8::/32"]}));
    let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["2001:db8::/32"]);
    assert_eq!(complaints, Vec::<String>::new());
}

#[test]
fn node_ports_only_where_the_type_has_them() {
    let ports = json!([{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81}]);
    for (kind, expected) in
        [("ClusterIP", None), ("NodePort", Some(30080)), ("LoadBalancer", Some(30080))]
    {
        let (service, complaints) = spec(json!({"type": kind, "ports": ports}));
        assert_eq!(service.ports[0].node_port.map(NonZeroU16::get), expected, "{kind}");
        assert_eq!(service.ports[1].node_port, None);
        assert_eq!(complaints, Vec::<String>::new());
    }
}

#[test]
fn an_impossible_service_port_costs_that_port_alone() {
    let (service, complaints) = spec(json!({"type": "NodePort", "ports": [
        {"name": "a", "port": 70000}, {"name": "b", "port": -1}, {"name": "c", "port": 0},
        {"name": "d", "port": 80, "protocol": "ICMP"}, {"name": "e", "port": 80, "nodePort": 70000},
        {"name": "f", "port": 80}, {"name": "f", "port": 80, "protocol": "UDP"}, {"name": "e", "port": 90},
    ]}));
    let kept: Vec<(&str, Protocol, u16)> =
        service.ports.iter().map(|port| (&*port.name, port.protocol, port.port.get())).collect();
    assert_eq!(kept, [("e", Protocol::Tcp, 80), ("f", Protocol::Udp, 80)]);
    assert_eq!(service.ports[0].node_port, None);
    assert_eq!(complaints.len(), 7, "{complaints:?}");
    assert_eq!(complaints[0], "spec.ports[0].port: 70000 is not a port (1 to 65535)");
}

#[test]
fn traffic_policies_default_to_cluster() {
    let (service, _) = spec(json!({"type": "NodePort"}));
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(service.external_policy, TrafficPolicy::Cluster);
    let (service, complaints) = spec(json!({"type": "NodePort",
        "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}));
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
    assert_eq!(service.external_policy, TrafficPolicy::Local);
    assert_eq!(complaints, Vec::<String>::new());
    let (service, complaints) = spec(json!({"internalTrafficPolicy": "Nearby"}));
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(complaints.len(), 1);
}

#[test]
fn external_policy_needs_something_external() {
    let local = json!({"externalTrafficPolicy": "Local"});
    assert_eq!(spec(local).0.external_policy, TrafficPolicy::Cluster);
    let external = json!({"externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]});
    assert_eq!(spec(external).0.external_policy, TrafficPolicy::Local);
}

#[test]
fn affinity_timeout_defaults_to_10800() {
    let affinity = |config: Value| {
        let (service, complaints) =
            spec(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}));
        (service.affinity.map(|timeout| timeout.as_secs()), complaints.len())
    };
    assert_eq!(affinity(json!(null)), (Some(10_800), 0));
    assert_eq!(affinity(json!({"clientIP": {}})), (Some(10_800), 0));
    assert_eq!(affinity(json!({"clientIP": {"timeoutSeconds": 600}})), (Some(600), 0));
    assert_eq!(affinity(json!({"clientIP": {"timeoutSeconds": -5}})), (Some(10_800), 1));
    assert_eq!(spec(json!({"sessionAffinity": "None"})).0.affinity, None);
}

#[test]
fn health_check_node_port_only_for_external_local_load_balancers() {
    for (kind, policy, expected) in [
        ("LoadBalancer", "Local", Some(32082)),
        ("LoadBalancer", "Cluster", None),
        ("NodePort", "Local", None),
    ] {
        let (service, _) = spec(json!({"type": kind, "externalTrafficPolicy": policy,
            "healthCheckNodePort": 32082}));
        let found = service.health_check_node_port.map(NonZeroU16::get);
        assert_eq!(found, expected, "{kind} {policy}");
    }
}

#[test]
fn the_older_service_can_be_told_by_its_creation_time() {
    assert_eq!(spec(json!({})).0.created, 1_795_250_187);
}

#[test]
fn slices_without_the_service_name_label_and_fqdn_slices_are_ignored() {
    for patch in [
        json!({"metadata": {"name": "s", "namespace": "shop"}}),
        json!({"metadata": {"name": "s", "namespace": "shop", "labels": {LABEL_SERVICE_NAME: ""}}}),
        json!({"metadata": {"name": "s", "namespace": "shop",
            "labels": {LABEL_SERVICE_NAME: "web", LABEL_HEADLESS: ""}}}),
        json!({"addressType": "FQDN", "endpoints": [{"addresses": ["backend.example.com"]}]}),
        json!({"addressType": ""}),
    ] {
        let object = make_slice(patch.clone());
        assert!(matches!(slice(&object), Converted::NotOurs(_)), "{patch}");
    }
}

#[test]
fn ports_nil_0_or_outside_1_to_65535_are_skipped_alone() {
    let (slice, complaints) = patched_slice(json!({"ports": [
        {"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 70000},
        {"name": "d", "port": -1}, {"name": "e", "port": 1, "protocol": "QUIC"},
        {"name": "f", "port": 65535, "protocol": "SCTP"}, {"port": 80},
    ]}));
    let kept: Vec<(&str, Protocol, u16)> =
        slice.ports.iter().map(|port| (&*port.name, port.protocol, port.port.get())).collect();
    assert_eq!(kept, [("f", Protocol::Sctp, 65535), ("", Protocol::Tcp, 80)]);
    assert_eq!(
        complaints,
        [
            "ports[0].port: no port is given",
            "ports[1].port: 0 is not a port (1 to 65535)",
            "ports[2].port: 70000 is not a port (1 to 65535)",
            "ports[3].port: -1 is not a port (1 to 65535)",
            "ports[4].protocol: \"QUIC\" is not TCP, UDP or SCTP",
        ]
    );
}

#[test]
fn endpoints_without_address_are_skipped_and_only_the_first_address_is_used() {
    let (slice, complaints) = patched_slice(json!({"endpoints": [
        {"addresses": []}, {"addresses": ["10.244.0.7", "10.244.0.8"]}, {"addresses": null},
    ]}));
    assert_eq!(slice.endpoints.len(), 1);
    assert_eq!(slice.endpoints[0].address, addresses(&["10.244.0.7"])[0]);
    assert_eq!(complaints.len(), 2, "{complaints:?}");
}

#[test]
fn addresses_that_can_never_be_an_endpoint_are_rejected_per_endpoint() {
    for (kind, wrong) in [
        (
            "IPv4",
            &[
                "0.0.0.0",
                "127.0.0.1",
                "127.8.8.8",
                "169.254.169.254",
                "224.0.0.1",
                "255.255.255.255",
                "fd00::1",
                "",
                "pod",
            ][..],
        ),
        ("IPv6", &["::", "::1", "fe80::1", "ff02::1", "10.0.0.1", "::ffff:10.0.0.1"][..]),
    ] {
        let good = if kind == "IPv4" { "10.244.0.7" } else { "fd00:10:244::7" };
        let mut endpoints: Vec<Value> =
            wrong.iter().map(|text| json!({"addresses": [text]})).collect();
        endpoints.push(json!({"addresses": [good]}));
        let (slice, complaints) =
            patched_slice(json!({"addressType": kind, "endpoints": endpoints}));
        assert_eq!(slice.endpoints.len(), 1, "{kind}");
        assert_eq!(slice.endpoints[0].address.to_string(), good);
        assert_eq!(complaints.len(), wrong.len(), "{complaints:?}");
    }
}

#[test]
fn ready_nil_is_true_serving_nil_is_true_terminating_nil_is_false() {
    let (slice, _) = patched_slice(json!({"endpoints": [
        {"addresses": ["10.244.0.1"]},
        {"addresses": ["10.244.0.2"], "conditions": {}},
        {"addresses": ["10.244.0.3"], "conditions":
            {"ready": false, "serving": false, "terminating": true}},
    ]}));
    let conditions: Vec<(bool, bool, bool)> =
        slice.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    assert_eq!(conditions, [(true, true, false), (true, true, false), (false, false, true)]);
}

#[test]
fn node_zone_and_hints_are_kept() {
    let (slice, _) = patched_slice(json!({"endpoints": [
        {"addresses": ["10.244.0.1"], "nodeName": "node-a", "zone": "z1", "hints":
            {"forZones": [{"name": "z1"}, {"name": "z2"}], "forNodes": [{"name": "node-a"}]}},
        {"addresses": ["10.244.0.2"], "nodeName": "", "zone": ""},
    ]}));
    let first = &slice.endpoints[0].placement;
    assert_eq!(first.node.as_ref().map(ToString::to_string).as_deref(), Some("node-a"));
    assert_eq!(first.zone.as_ref().map(ToString::to_string).as_deref(), Some("z1"));
    assert_eq!(first.hint_zones.len(), 2);
    assert_eq!(first.hint_nodes.len(), 1);
    let second = &slice.endpoints[1].placement;
    assert_eq!((&second.node, &second.zone), (&None, &None));
    assert!(second.hint_zones.is_empty() && second.hint_nodes.is_empty());
}

#[test]
fn the_trigger_time_is_read_and_a_wrong_one_costs_only_itself() {
    let metadata = |time: &str| {
        json!({"metadata": {"name": "web-1", "namespace": "shop",
            "labels": {LABEL_SERVICE_NAME: "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": time}}})
    };
    let (slice, complaints) = patched_slice(metadata("2026-11-20T10:00:00.5Z"));
    let expected = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_168_800_500);
    assert_eq!(slice.triggered, Some(expected));
    assert!(complaints.is_empty());
    let (slice, complaints) = patched_slice(metadata("yesterday"));
    assert_eq!(slice.triggered, None);
    assert_eq!(slice.endpoints.len(), 1);
    assert_eq!(complaints.len(), 1);
}

#[test]
fn the_nodes_first_internal_address_of_a_family_comes_first() {
    let object: wire::Node = serde_json::from_value(json!({
        "metadata": {"name": "node-a", "deletionTimestamp": "2026-11-21T08:36:27Z"},
        "spec": {"podCIDR": "10.244.0.0/24",
                 "taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
        "status": {"addresses": [
            {"type": "ExternalIP", "address": "203.0.113.9"},
            {"type": "Hostname", "address": "node-a"},
            {"type": "InternalIP", "address": "10.99.0.2"},
            {"type": "InternalIP", "address": "rubbish"},
        ]},
    }))
    .expect("a Node");
    let (node, complaints) = ours(node(&object));
    assert_eq!(node.addresses, addresses(&["10.99.0.2", "203.0.113.9"]));
    assert_eq!(node.pod_cidrs[0].to_string(), "10.244.0.0/24");
    assert!(node.deleting && node.scaling_down);
    assert_eq!(node.zone, None);
    assert_eq!(complaints.len(), 1);
}

/// Body of an answer recorded from a real API server.
fn fixture(name: &str) -> String {
    let path = format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (_, body) = text
        .split_once("\r\n\r\n")
        .or_else(|| text.split_once("\n\n"))
        .expect("headers and a body");
    body.to_owned()
}

/// Every object in a recorded list or watch, bookmarks and errors left out.
fn fixture_objects<T: serde::de::DeserializeOwned>(name: &str) -> Vec<T> {
    let mut found = Vec::new();
    for document in serde_json::Deserializer::from_str(&fixture(name)).into_iter::<Value>() {
        let document = document.expect("JSON");
        match (&document["items"], document["type"].as_str()) {
            (Value::Array(items), _) => found.extend(items.iter().cloned()),
            (_, Some("BOOKMARK" | "ERROR")) => {}
            (_, Some(_)) => found.push(document["object"].clone()),
            (_, None) => found.push(document),
        }
    }
    found.into_iter().map(|item| serde_json::from_value(item).expect("an object")).collect()
}

#[test]
fn every_recorded_service_converts_without_complaint() {
    for (name, ours_expected, others_expected) in [
        ("list-services.http", 6, 3),
        ("list-services-selected.http", 6, 2),
        ("list-services-page1-limit3.http", 3, 0),
        ("list-services-page2-limit3.http", 1, 2),
        ("watchlist-services.http", 7, 2),
        ("watch-services.http", 1, 1),
    ] {
        let mut counts = (0, 0);
        for object in fixture_objects::<wire::Service>(name) {
            match service(&object) {
                Converted::Ours(_, complaints) => {
                    assert_eq!(complaints, [], "{name}");
                    counts.0 += 1;
                }
                Converted::NotOurs(_) => counts.1 += 1,
                Converted::Rejected(rejected) => panic!("{name}: {rejected:?}"),
            }
        }
        assert_eq!(counts, (ours_expected, others_expected), "{name}");
    }
}

#[test]
fn the_recorded_load_balancer_service_has_everything() {
    let web = fixture_objects::<wire::Service>("list-services.http")
        .iter()
        .find_map(|object| match service(object) {
            Converted::Ours(service, _) if &*service.name.name == "web" => Some(service),
            _ => None,
        })
        .expect("shop/web");
    assert_eq!(web.cluster_ips, addresses(&["10.101.40.77", "fd00:10:96::d:bba0"]));
    assert_eq!(web.load_balancer_ips, addresses(&["203.0.113.80"]));
    assert_eq!(web.external_policy, TrafficPolicy::Local);
    assert_eq!(web.affinity, Some(Duration::from_secs(600)));
    assert_eq!(web.health_check_node_port.map(NonZeroU16::get), Some(32082));
    assert_eq!(web.source_ranges.len(), 2);
    let ports: Vec<(u16, Option<u16>)> = web
        .ports
        .iter()
        .map(|port| (port.port.get(), port.node_port.map(NonZeroU16::get)))
        .collect();
    assert_eq!(ports, [(80, Some(32224)), (443, Some(31243))]);
}

#[test]
fn the_ranges_of_a_service_cidr() {
    let object = |cidrs: Value| {
        let object = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
        service_cidr(&serde_json::from_value(object).expect("a ServiceCIDR"))
    };
    let (converted, complaints) = ours(object(json!(["10.96.0.1/12", "fd00:10:96::/108"])));
    assert_eq!(complaints, Vec::<String>::new());
    assert_eq!(converted.name, ObjectName::new("", "kubernetes"));
    let ranges: Vec<String> = converted.ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.96.0.0/12", "fd00:10:96::/108"]);

    let (converted, complaints) = ours(object(json!(["::/0", "10.96.0.0", "10.0.0.0/8"])));
    assert_eq!(converted.ranges.len(), 1);
    assert_eq!(complaints.len(), 2, "{complaints:?}");
    assert!(complaints[0].starts_with("spec.cidrs[0]: \"::/0\" holds"), "{complaints:?}");
    assert_eq!(ours(object(Value::Null)).0.ranges, []);
    let nameless = service_cidr(&wire::ServiceCIDR::default());
    assert!(matches!(nameless, Converted::Rejected(_)));
}

#[test]
fn every_recorded_slice_and_node_converts_without_complaint() {
    let mut found = Vec::new();
    for name in ["list-endpointslices.http", "watch-endpointslices.http"] {
        for object in fixture_objects::<wire::EndpointSlice>(name) {
            if let Converted::Ours(slice, complaints) = slice(&object) {
                assert_eq!(complaints, [], "{name}");
                found.push((slice.name.name.to_string(), slice.family, slice.endpoints.len()));
            }
        }
    }
    let found: Vec<(&str, Family, usize)> =
        found.iter().map(|(name, family, count)| (name.as_str(), *family, *count)).collect();
    assert_eq!(
        found,
        [
            ("kubernetes", Family::V4, 1),
            ("kube-dns-abc12", Family::V4, 2),
            ("api-1", Family::V4, 1),
            ("api-2", Family::V4, 1),
            ("web-v4", Family::V4, 3),
            ("web-v6", Family::V6, 1),
            ("signalling-1", Family::V4, 1),
            ("web-v4", Family::V4, 3),
        ]
    );
    let nodes = fixture_objects::<wire::Node>("get-node.http");
    let (node, complaints): (Node, _) = ours(node(&nodes[0]));
    assert_eq!(complaints, Vec::<String>::new());
    assert_eq!(node.addresses, addresses(&["10.99.0.2", "fd00:99::2"]));
    assert_eq!(node.zone.map(|zone| zone.to_string()).as_deref(), Some("z1"));
    assert_eq!(node.pod_cidrs.len(), 2);
}

/// Strings that parsers trip over, among arbitrary ones.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("None".to_owned()),
        Just("0.0.0.0/0".to_owned()),
        Just("10.0.0.0/255.0.0.0".to_owned()),
        Just("::ffff:1.2.3.4/120".to_owned()),
        Just("-9999-01-01T00:00:00Z".to_owned()),
        Just("9999-12-31T23:59:59.999999999Z".to_owned()),
        "[0-9a-fA-F:.%/+-]{0,24}",
        ".{0,12}",
    ]
}

proptest! {
    #[test]
    fn conversion_never_panics_whatever_the_fields_hold(
        texts in proptest::collection::vec(any_text(), 12),
        numbers in proptest::collection::vec(any::<i32>(), 4),
        kind in prop_oneof![Just("LoadBalancer"), Just("NodePort"), Just("ClusterIP"), Just("")],
    ) {
        let t = |index: usize| texts[index].clone();
        let object = make_service(json!({t(0): t(1)}), json!({
            "type": kind, "clusterIP": t(2), "clusterIPs": [t(2), t(3)], "externalIPs": [t(4), t(5)],
            "loadBalancerSourceRanges": [t(6), t(7)], "externalTrafficPolicy": t(8),
            "internalTrafficPolicy": t(9), "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": numbers[0]}},
            "healthCheckNodePort": numbers[1],
            "ports": [{"name": t(10), "port": numbers[2], "nodePort": numbers[3], "protocol": t(11)}],
        }), json!({"loadBalancer": {"ingress": [{"ip": t(4), "ipMode": t(5)}]}}));
        if let Converted::Ours(service, _) = service(&object) {
            prop_assert!(!service.cluster_ips.is_empty());
        }
        let object = make_slice(json!({
            "metadata": {"name": t(0), "namespace": t(1),
                "labels": {"kubernetes.io/service-name": t(2)},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": t(3)}},
            "ports": [{"name": t(4), "port": numbers[0], "protocol": t(5)}],
            "endpoints": [{"addresses": [t(6), t(7)], "nodeName": t(8), "zone": t(9)}],
        }));
        if let Converted::Ours(slice, _) = slice(&object) {
            prop_assert!(slice.endpoints.iter().all(|e| unusable(e.address).is_none()));
        }
        let object: wire::Node = serde_json::from_value(json!({
            "metadata": {"name": t(0)}, "spec": {"podCIDRs": [t(1), t(2)]},
            "status": {"addresses": [{"type": "InternalIP", "address": t(3)}]},
        })).expect("a Node");
        let _ = node(&object);
    }
}
