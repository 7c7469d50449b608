//! Defaulting of objects, as `pkg/apis/core/v1/defaults.go` and
//! `pkg/registry/core/service/strategy.go` of Kubernetes do it, as far as the recorded
//! answers show it.

use serde_json::{Map, Value, json};

use super::resource::Resource;

/// Whether `.status` of a new object is the client's to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusOf {
    /// Kept: the in-process API, where a test states a whole object at once.
    Client,
    /// Dropped for a Service: over HTTP only `/status` writes it.
    Server,
}

/// Fills in what a client may leave out, for a new object and for a changed one.
pub fn apply(resource: Resource, object: &mut Value) {
    match resource {
        Resource::Service => service(object),
        Resource::EndpointSlice => endpoint_slice(object),
        Resource::Node => node(object),
        Resource::Namespace => {
            set(object, "spec", json!({"finalizers": ["kubernetes"]}));
            set(object, "status", json!({"phase": "Active"}));
        }
        Resource::ServiceCidr => set(object, "status", json!({})),
        Resource::Event | Resource::EventsEvent => {}
    }
}

/// What only happens when an object is made.
pub fn on_create(resource: Resource, object: &mut Value, status: StatusOf) {
    match resource {
        Resource::Service if status == StatusOf::Server => {
            if let Some(map) = object.as_object_mut() {
                map.remove("status");
            }
        }
        // The TaintNodesByCondition admission plugin: a Node starts not ready.
        Resource::Node if status == StatusOf::Server => {
            set(object, "spec", json!({}));
            let taint = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"});
            match object["spec"]["taints"].as_array_mut() {
                Some(taints) if taints.iter().any(|t| t["key"] == taint["key"]) => {}
                Some(taints) => taints.push(taint),
                None => object["spec"]["taints"] = json!([taint]),
            }
        }
        _ => {}
    }
}

/// Whether the Service has a cluster address, or is headless.
pub fn has_cluster_ip(spec: &Value) -> bool {
    spec["type"] != "ExternalName"
}

/// Whether node ports belong to the Service.
pub fn has_node_ports(spec: &Value) -> bool {
    match spec["type"].as_str() {
        Some("NodePort") => true,
        Some("LoadBalancer") => spec["allocateLoadBalancerNodePorts"] != json!(false),
        _ => false,
    }
}

/// Whether a health check node port belongs to the Service.
pub fn has_health_check(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}

fn externally_accessible(spec: &Value) -> bool {
    matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"))
        || (spec["type"] == "ClusterIP"
            && spec["externalIPs"].as_array().is_some_and(|l| !l.is_empty()))
}

fn service(object: &mut Value) {
    set(object, "spec", json!({}));
    set(object, "status", json!({}));
    set(&mut object["status"], "loadBalancer", json!({}));
    for ingress in elements(&mut object["status"]["loadBalancer"]["ingress"]) {
        if ingress["ip"].is_string() {
            set(ingress, "ipMode", json!("VIP"));
        }
    }
    let spec = &mut object["spec"];
    set(spec, "type", json!("ClusterIP"));
    set(spec, "sessionAffinity", json!("None"));
    if spec["sessionAffinity"] == "ClientIP" {
        set(spec, "sessionAffinityConfig", json!({}));
        set(&mut spec["sessionAffinityConfig"], "clientIP", json!({}));
        set(&mut spec["sessionAffinityConfig"]["clientIP"], "timeoutSeconds", json!(10800));
    } else {
        remove(spec, "sessionAffinityConfig");
    }
    for port in elements(&mut spec["ports"]) {
        set(port, "protocol", json!("TCP"));
        let unset = matches!(&port["targetPort"], Value::Null)
            || port["targetPort"] == json!(0)
            || port["targetPort"] == json!("");
        if unset {
            port["targetPort"] = port["port"].clone();
        }
    }
    if has_cluster_ip(spec) {
        set(spec, "internalTrafficPolicy", json!("Cluster"));
    }
    if externally_accessible(spec) {
        set(spec, "externalTrafficPolicy", json!("Cluster"));
    }
    if spec["type"] == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", json!(true));
    }
}

/// Fields of the old type that the new type does not have (`dropTypeDependentFields`).
pub fn drop_foreign_fields(spec: &mut Value) {
    if !externally_accessible(spec) {
        remove(spec, "externalTrafficPolicy");
    }
    if spec["type"] != "LoadBalancer" {
        remove(spec, "allocateLoadBalancerNodePorts");
    }
    if !has_health_check(spec) {
        remove(spec, "healthCheckNodePort");
    }
    if !has_cluster_ip(spec) {
        for field in
            ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"]
        {
            remove(spec, field);
        }
    }
    let type_has_them = matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"));
    if !type_has_them {
        for port in elements(&mut spec["ports"]) {
            remove(port, "nodePort");
        }
    }
}

/// What a client that sends a whole Service need not repeat: addresses and node ports
/// that were allocated (`patchAllocatedValues`).
pub fn carry_allocated(spec: &mut Value, old: &Value) {
    if has_cluster_ip(spec) && has_cluster_ip(old) {
        if spec["clusterIP"].is_null() || spec["clusterIP"] == "" {
            spec["clusterIP"] = old["clusterIP"].clone();
        }
        if spec["clusterIP"] == old["clusterIP"] {
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                set(spec, field, old[field].clone());
            }
        }
    }
    if has_node_ports(spec) && has_node_ports(old) {
        let old_ports = old["ports"].as_array().cloned().unwrap_or_default();
        for port in elements(&mut spec["ports"]) {
            let same = |o: &&Value| o["port"] == port["port"] && o["protocol"] == port["protocol"];
            if let Some(found) = old_ports.iter().find(same) {
                let node_port = found["nodePort"].clone();
                set(port, "nodePort", node_port);
            }
        }
    }
    if has_health_check(spec) && has_health_check(old) {
        set(spec, "healthCheckNodePort", old["healthCheckNodePort"].clone());
    }
}

fn endpoint_slice(object: &mut Value) {
    set(object, "addressType", json!(""));
    for endpoint in elements(&mut object["endpoints"]) {
        set(endpoint, "conditions", json!({}));
    }
    for port in elements(&mut object["ports"]) {
        set(port, "name", json!(""));
        set(port, "protocol", json!("TCP"));
    }
}

fn node(object: &mut Value) {
    set(object, "spec", json!({}));
    let spec = &mut object["spec"];
    if spec["podCIDR"].is_string() && spec["podCIDRs"].is_null() {
        spec["podCIDRs"] = json!([spec["podCIDR"]]);
    }
    if let (true, Some(first)) = (spec["podCIDR"].is_null(), spec["podCIDRs"].get(0).cloned()) {
        spec["podCIDR"] = first;
    }
    let empty = format!("{{{}}}", Resource::Node.info().empty);
    let empty: Value = serde_json::from_str(&empty).unwrap_or_default();
    set(object, "status", json!({}));
    for field in ["daemonEndpoints", "nodeInfo"] {
        set(&mut object["status"], field, empty["status"][field].clone());
    }
    prune_null(&mut object["spec"]);
}

/// Sets a field that is absent or null.
fn set(object: &mut Value, field: &str, default: Value) {
    if object.is_null() {
        *object = json!({});
    }
    if let Some(map) = object.as_object_mut()
        && map.get(field).is_none_or(Value::is_null)
    {
        if default.is_null() {
            map.remove(field);
        } else {
            map.insert(field.to_owned(), default);
        }
    }
}

fn remove(object: &mut Value, field: &str) {
    if let Some(map) = object.as_object_mut() {
        map.remove(field);
    }
}

fn elements(list: &mut Value) -> impl Iterator<Item = &mut Value> {
    list.as_array_mut().into_iter().flatten()
}

/// Removes nulls, at every depth: an unset field is left out of an object's JSON.
/// (Indexing a mutable `Value` also leaves nulls behind.)
pub fn prune_null(value: &mut Value) {
    match value {
        Value::Object(map) => {
            *map = std::mem::take(map)
                .into_iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(k, mut v)| {
                    prune_null(&mut v);
                    (k, v)
                })
                .collect::<Map<_, _>>();
        }
        Value::Array(list) => list.iter_mut().for_each(prune_null),
        _ => {}
    }
}
