//! Many Services with endpoints, for measuring: printed straight into the form in which
//! the store keeps them, so that 10,000 of them take a fraction of a second.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use serde_json::json;

use super::object::Object;
use super::resource::Resource;
use super::store::{Store, now};

/// Namespace of generated objects.
pub const NAMESPACE: &str = "scale";
/// The EndpointSlice controller's `--max-endpoints-per-slice` by default.
const PER_SLICE: usize = 100;
/// Generated pods live here: room for 8 million, apart from the service range.
const FIRST_POD: u32 = u32::from_be_bytes([10, 128, 0, 0]);

/// Name of the Service with this index.
pub fn service_name(index: usize) -> String {
    format!("svc-{index:05}")
}

/// Name of a Service's slice; `part` is above 0 only beyond 100 endpoints.
pub fn slice_name(index: usize, part: usize) -> String {
    format!("svc-{index:05}-{part:03}")
}

/// Address of an endpoint: `number` counts through all endpoints of all Services.
pub fn endpoint_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_POD.wrapping_add(u32::try_from(number).unwrap_or(u32::MAX)))
}

impl Store {
    /// Adds `services` ClusterIP Services (port 80 to 8080, TCP) with `endpoints` ready
    /// endpoints each, spread over `node-a` in zone z1 and `node-b` in zone z2.
    pub fn load_generated(&self, services: usize, endpoints: usize) {
        self.load_generated_in(NAMESPACE, services, endpoints);
    }

    /// The same in a namespace of one's choice.
    pub fn load_generated_in(&self, namespace: &str, services: usize, endpoints: usize) {
        let time = now();
        let managed = self.settings().managed_fields;
        self.bulk(Resource::Service, services, |at, version, uid, allocator| {
            let name = service_name(at);
            let key = Resource::Service.key(namespace, &name);
            let mut spec = json!({"type": "ClusterIP"});
            // An address is missing only if the range is full; then the object shows none.
            let _ = allocator.assign(&key, &mut spec);
            let ip = spec["clusterIP"].as_str().unwrap_or_default();
            let fields = if managed { managed_fields(SERVICE_FIELDS, "v1", &time) } else { String::new() };
            let body = format!(
                r#"{{"metadata":{{"name":"{name}","namespace":"{namespace}","uid":"{uid}","resourceVersion":"{version}","creationTimestamp":"{time}","labels":{{"app":"{name}"}}{fields}}},"spec":{{"ports":[{{"name":"http","protocol":"TCP","port":80,"targetPort":8080}}],"selector":{{"app":"{name}"}},"clusterIP":"{ip}","clusterIPs":["{ip}"],"type":"ClusterIP","sessionAffinity":"None","ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack","internalTrafficPolicy":"Cluster"}},"status":{{"loadBalancer":{{}}}}}}"#
            );
            (key, Object::from_parts((namespace, &name), version, &[("app", &name)], body))
        });
        let parts = endpoints.div_ceil(PER_SLICE).max(1);
        self.bulk(Resource::EndpointSlice, services * parts, |at, version, uid, _| {
            let (service, part) = (at / parts, at % parts);
            let first = part * PER_SLICE;
            let last = endpoints.min(first + PER_SLICE);
            let numbers = (service * endpoints + first)..(service * endpoints + last);
            let fields = if managed {
                managed_fields(SLICE_FIELDS, "discovery.k8s.io/v1", &time)
            } else {
                String::new()
            };
            slice((namespace, service, part), version, uid, (&time, &fields), numbers)
        });
    }
}

fn slice(
    (namespace, service, part): (&str, usize, usize),
    version: u64,
    uid: &str,
    (time, fields): (&str, &str),
    numbers: std::ops::Range<usize>,
) -> (String, Object) {
    let (name, owner) = (slice_name(service, part), service_name(service));
    let labels = [
        ("app", owner.as_str()),
        ("endpointslice.kubernetes.io/managed-by", "endpointslice-controller.k8s.io"),
        ("kubernetes.io/service-name", owner.as_str()),
    ];
    let mut body = format!(
        r#"{{"metadata":{{"name":"{name}","generateName":"{owner}-","namespace":"{namespace}","uid":"{uid}","resourceVersion":"{version}","generation":1,"creationTimestamp":"{time}","labels":{{"app":"{owner}","endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io","kubernetes.io/service-name":"{owner}"}},"annotations":{{"endpoints.kubernetes.io/last-change-trigger-time":"{time}"}}{fields}}},"addressType":"IPv4","endpoints":["#
    );
    for (nth, number) in numbers.enumerate() {
        let comma = if nth == 0 { "" } else { "," };
        let (node, zone) = if number % 2 == 0 { ("node-a", "z1") } else { ("node-b", "z2") };
        let address = endpoint_address(number);
        // Writing to a String cannot fail.
        let _ = write!(
            body,
            r#"{comma}{{"addresses":["{address}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"targetRef":{{"kind":"Pod","namespace":"{namespace}","name":"{owner}-{number}","uid":"5e1f0000-0000-4000-8002-{number:012x}"}},"nodeName":"{node}","zone":"{zone}"}}"#
        );
    }
    body.push_str(r#"],"ports":[{"name":"http","protocol":"TCP","port":8080}]}"#);
    let key = Resource::EndpointSlice.key(namespace, &name);
    (key, Object::from_parts((namespace, &name), version, &labels, body))
}

const SERVICE_FIELDS: &str = r#"{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:internalTrafficPolicy":{},"f:ports":{".":{},"k:{\"port\":80,\"protocol\":\"TCP\"}":{".":{},"f:name":{},"f:port":{},"f:protocol":{},"f:targetPort":{}}},"f:selector":{},"f:sessionAffinity":{},"f:type":{}}}"#;
const SLICE_FIELDS: &str = r#"{"f:addressType":{},"f:endpoints":{},"f:metadata":{"f:annotations":{".":{},"f:endpoints.kubernetes.io/last-change-trigger-time":{}},"f:generateName":{},"f:labels":{".":{},"f:app":{},"f:endpointslice.kubernetes.io/managed-by":{},"f:kubernetes.io/service-name":{}}},"f:ports":{}}"#;

fn managed_fields(fields: &str, api_version: &str, time: &str) -> String {
    format!(
        r#","managedFields":[{{"manager":"test","operation":"Update","apiVersion":"{api_version}","time":"{time}","fieldsType":"FieldsV1","fieldsV1":{fields}}}]"#
    )
}
