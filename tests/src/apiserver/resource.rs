//! The resources served, and the discovery documents made from them.

use serde_json::{Value, json};

/// A resource of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Node.
    Node,
    /// `v1` Namespace. Objects may live in namespaces that were never created.
    Namespace,
    /// `v1` Event.
    Event,
    /// `events.k8s.io/v1` Event. Kept apart from `v1` (a real server shows one store
    /// under both), since the proxies write events and never read them.
    EventsEvent,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
}

/// What the server must know about a resource.
#[derive(Debug)]
pub struct Info {
    /// API group, empty for the core group.
    pub group: &'static str,
    /// API version inside the group.
    pub version: &'static str,
    /// `kind` of an object.
    pub kind: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    singular: &'static str,
    short: &'static [&'static str],
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Whether `metadata.generation` is kept (EndpointSlice has it, Service does not).
    pub generation: bool,
    /// Whether there is a `/status` subresource that alone writes `.status`.
    pub status: bool,
    /// What an object without content has besides `metadata`: a bookmark carries it.
    pub empty: &'static str,
}

const EMPTY_NODE: &str = r#""spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},"nodeInfo":{"machineID":"","systemUUID":"","bootID":"","kernelVersion":"","osImage":"","containerRuntimeVersion":"","kubeletVersion":"","kubeProxyVersion":"","operatingSystem":"","architecture":""}}"#;

static INFOS: [Info; 7] = [
    Info {
        group: "",
        version: "v1",
        kind: "Service",
        plural: "services",
        singular: "service",
        short: &["svc"],
        namespaced: true,
        generation: false,
        status: true,
        empty: r#""spec":{},"status":{"loadBalancer":{}}"#,
    },
    Info {
        group: "discovery.k8s.io",
        version: "v1",
        kind: "EndpointSlice",
        plural: "endpointslices",
        singular: "endpointslice",
        short: &[],
        namespaced: true,
        generation: true,
        status: false,
        empty: r#""addressType":"","endpoints":null,"ports":null"#,
    },
    Info {
        group: "",
        version: "v1",
        kind: "Node",
        plural: "nodes",
        singular: "node",
        short: &["no"],
        namespaced: false,
        generation: false,
        status: true,
        empty: EMPTY_NODE,
    },
    Info {
        group: "",
        version: "v1",
        kind: "Namespace",
        plural: "namespaces",
        singular: "namespace",
        short: &["ns"],
        namespaced: false,
        generation: false,
        status: true,
        empty: r#""spec":{},"status":{}"#,
    },
    Info {
        group: "",
        version: "v1",
        kind: "Event",
        plural: "events",
        singular: "event",
        short: &["ev"],
        namespaced: true,
        generation: false,
        status: false,
        empty: r#""involvedObject":{},"source":{}"#,
    },
    Info {
        group: "events.k8s.io",
        version: "v1",
        kind: "Event",
        plural: "events",
        singular: "event",
        short: &["ev"],
        namespaced: true,
        generation: false,
        status: false,
        empty: r#""eventTime":null,"regarding":{}"#,
    },
    Info {
        group: "networking.k8s.io",
        version: "v1",
        kind: "ServiceCIDR",
        plural: "servicecidrs",
        singular: "servicecidr",
        short: &[],
        namespaced: false,
        generation: false,
        status: true,
        empty: r#""spec":{},"status":{}"#,
    },
];

impl Resource {
    /// Every resource, in the order of the enum.
    pub const ALL: [Resource; 7] = [
        Resource::Service,
        Resource::EndpointSlice,
        Resource::Node,
        Resource::Namespace,
        Resource::Event,
        Resource::EventsEvent,
        Resource::ServiceCidr,
    ];

    /// The resource's properties.
    pub fn info(self) -> &'static Info {
        &INFOS[self as usize]
    }

    /// `apiVersion` of an object.
    pub fn api_version(self) -> String {
        group_version(self.info().group, self.info().version)
    }

    /// Name as error messages give it: `services`, `endpointslices.discovery.k8s.io`.
    pub fn qualified(self) -> String {
        match self.info() {
            Info { group: "", plural, .. } => (*plural).to_owned(),
            Info { group, plural, .. } => format!("{plural}.{group}"),
        }
    }

    /// The resource at a path.
    pub fn by_path(group: &str, version: &str, plural: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| {
            let info = r.info();
            info.group == group && info.version == version && info.plural == plural
        })
    }

    /// The resource of an object. Without an `apiVersion` the kind decides, and a
    /// plain `Event` is the core group's.
    pub fn by_kind(api_version: Option<&str>, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| {
            r.info().kind == kind && api_version.is_none_or(|wanted| wanted == r.api_version())
        })
    }

    /// Key of an object in the store, ordered as etcd orders lists.
    pub fn key(self, namespace: &str, name: &str) -> String {
        if self.info().namespaced { format!("{namespace}/{name}") } else { name.to_owned() }
    }

    fn api_resources(self) -> Vec<Value> {
        let info = self.info();
        let verbs = json!([
            "create",
            "delete",
            "deletecollection",
            "get",
            "list",
            "patch",
            "update",
            "watch"
        ]);
        let mut whole = json!({
            "name": info.plural, "singularName": info.singular, "namespaced": info.namespaced,
            "kind": info.kind, "verbs": verbs,
        });
        if !info.short.is_empty() {
            whole["shortNames"] = json!(info.short);
        }
        let status = json!({
            "name": format!("{}/status", info.plural), "singularName": "", "kind": info.kind,
            "namespaced": info.namespaced, "verbs": ["get", "patch", "update"],
        });
        if info.status { vec![whole, status] } else { vec![whole] }
    }
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// `/version`.
pub fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "emulationMajor": "1", "emulationMinor": "36",
        "minCompatibilityMajor": "1", "minCompatibilityMinor": "35",
        "gitVersion": "v1.36.2", "gitCommit": "", "gitTreeState": "clean", "buildDate": "",
        "goVersion": "", "compiler": "", "platform": "linux/amd64",
    })
}

/// `/api`.
pub fn api_versions(address: &str) -> Value {
    json!({
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    })
}

/// `/apis`.
pub fn api_groups() -> Value {
    let mut groups: Vec<Value> = Vec::new();
    for info in Resource::ALL.map(Resource::info) {
        if info.group.is_empty() || groups.iter().any(|g| g["name"] == info.group) {
            continue;
        }
        let version = json!({
            "groupVersion": group_version(info.group, info.version), "version": info.version,
        });
        groups.push(json!({
            "name": info.group, "versions": [version.clone()], "preferredVersion": version,
        }));
    }
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/api/v1` and `/apis/GROUP/VERSION`; `None` when nothing of it is served.
pub fn api_resource_list(group: &str, version: &str) -> Option<Value> {
    let resources: Vec<Value> = Resource::ALL
        .into_iter()
        .filter(|r| r.info().group == group && r.info().version == version)
        .flat_map(Resource::api_resources)
        .collect();
    (!resources.is_empty()).then(|| {
        json!({
            "kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": group_version(group, version), "resources": resources,
        })
    })
}
