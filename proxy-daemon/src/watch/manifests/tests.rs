use std::path::Path;

use super::*;
use crate::model::{Change, Service};
use crate::watch::convert::Part;

const WEB: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  ports:
  - {name: http, port: 80}
";

fn parsed(file: &str, text: &str) -> Result<usize, String> {
    parse(Path::new(file), text).map(|objects| objects.len()).map_err(|error| error.to_string())
}

#[test]
fn every_document_of_the_recorded_manifests_parses() {
    let path = format!("{}/../tests/fixtures/manifests.yaml", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).expect("the fixture");
    let documents = text.split("\n---").count();
    assert_eq!(parsed("x.yaml", &text), Ok(documents));
}

#[test]
fn other_kinds_comments_and_empty_documents_are_ignored() {
    let text = format!(
        "# only a comment\n---\n---\n{WEB}---\napiVersion: apps/v1\nkind: Deployment\n\
         metadata: {{name: x}}\n---\napiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n"
    );
    assert_eq!(parsed("x.yaml", &text), Ok(1));
    assert_eq!(parsed("x.yaml", ""), Ok(0));
    assert_eq!(parsed("x.json", ""), Ok(0));
}

#[test]
fn lists_are_taken_apart_typed_or_not() {
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  \
                metadata: {name: a}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: p}\n";
    assert_eq!(parsed("x.yaml", list), Ok(1));
    let typed =
        "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n";
    assert_eq!(parsed("x.yaml", typed), Ok(2));
    let wrong = typed.replace("{name: b}", "{name: b}\n  spec: {ports: 5}");
    let error = parsed("x.yaml", &format!("{WEB}---\n{wrong}")).expect_err("ports are a list");
    assert!(error.starts_with("9:1: items[1].spec.ports: "), "{error}");
}

#[test]
fn errors_name_line_and_field() {
    let text = format!("{WEB}---\n{}", WEB.replace("port: 80", "port: eighty"));
    let error = parsed("x.yaml", &text).expect_err("a port that is a word");
    assert!(error.starts_with("15:"), "{error}");
    assert!(error.contains("spec.ports[0].port: invalid type"), "{error}");
    assert!(!error.contains("at line"), "{error}");

    let error = parsed("x.yaml", "kind: [unclosed\nx: 1\n").expect_err("not YAML");
    assert!(error.starts_with("2:"), "{error}");

    let json = "{\"apiVersion\": \"v1\", \"kind\": \"Node\"}\n\n\
                {\"apiVersion\": \"v1\", \"kind\": \"Service\",\n \"spec\": {\"ports\":\n  7}}";
    let error = parsed("x.json", json).expect_err("ports are a list");
    assert!(error.starts_with("5:"), "{error}");
    assert!(error.contains("spec.ports: invalid type"), "{error}");
    let error = parsed("x.json", "{\n").expect_err("not JSON");
    assert!(error.starts_with("2:") || error.starts_with("1:"), "{error}");
}

#[test]
fn a_missing_namespace_is_default() {
    let objects = parse(Path::new("x.yaml"), WEB).expect("parses");
    let Object::Service(service) = &objects[0] else { panic!("a Service") };
    assert_eq!(service.metadata.namespace.as_deref(), Some("default"));
}

struct Bed {
    directory: tempfile::TempDir,
    events: mpsc::Receiver<Event>,
    stats: Arc<SourceStats>,
}

fn write(directory: &Path, name: &str, text: &str) {
    // As the documentation asks for: whole or not at all.
    let hidden = directory.join(format!(".{name}"));
    fs::write(&hidden, text).expect("written");
    fs::rename(&hidden, directory.join(name)).expect("renamed");
}

fn start(files: &[(&str, &str)]) -> Bed {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        write(directory.path(), name, text);
    }
    let stats = Arc::new(SourceStats::default());
    let node = NodeName::new("node-a");
    let manifests = Manifests::open(directory.path(), node, Arc::clone(&stats)).expect("opens");
    let (sender, events) = mpsc::channel(64);
    tokio::spawn(manifests.run(sender));
    Bed { directory, events, stats }
}

impl Bed {
    async fn event(&mut self) -> Event {
        timeout(Duration::from_secs(20), self.events.recv())
            .await
            .expect("an event in time")
            .expect("the source runs")
    }

    /// The Services of the next delivery, and its Node.
    async fn next(&mut self) -> (Vec<Service>, Option<Node>) {
        let mut services = None;
        loop {
            match self.event().await {
                Event::Services(Change::Reset { objects, .. }) => services = Some(objects),
                Event::Slices(Change::Reset { .. })
                | Event::ServiceCidrs(Change::Reset { .. })
                | Event::Rejected(_) => {}
                Event::Node(node) => return (services.expect("Services first"), node),
                other => panic!("{other:?}"),
            }
        }
    }

    async fn names(&mut self) -> Vec<String> {
        let (services, _) = self.next().await;
        services.iter().map(|service| service.name.to_string()).collect()
    }
}

#[tokio::test]
async fn service_cidrs_are_taken_from_documents_and_lists() {
    let one = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
               spec: {cidrs: [10.96.0.0/12]}\n";
    let list = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDRList\nitems:\n\
                - metadata: {name: more}\n  spec: {cidrs: ['fd00:10:96::/108']}\n";
    let mut bed = start(&[("a.yaml", one), ("b.yaml", list)]);
    loop {
        if let Event::ServiceCidrs(change) = bed.event().await {
            let Change::Reset { objects, rejected } = change else { panic!("{change:?}") };
            let names: Vec<String> = objects.iter().map(|o| o.name.name.to_string()).collect();
            assert_eq!(names, ["kubernetes", "more"]);
            assert_eq!(rejected, []);
            return;
        }
    }
}

#[tokio::test]
async fn changes_of_the_directory_arrive_and_removed_files_take_their_objects_with_them() {
    let mut bed = start(&[("a.yaml", WEB)]);
    assert_eq!(bed.names().await, ["default/web"]);
    write(bed.directory.path(), "b.yml", &WEB.replace("name: web", "name: api"));
    assert_eq!(bed.names().await, ["default/web", "default/api"]);
    // Neither the extension nor a hidden file counts.
    write(bed.directory.path(), "c.txt", &WEB.replace("name: web", "name: not"));
    fs::remove_file(bed.directory.path().join("a.yaml")).expect("removed");
    assert_eq!(bed.names().await, ["default/api"]);
}

#[tokio::test]
async fn a_file_that_turns_bad_keeps_its_last_good_objects_and_the_others_go_on() {
    let mut bed = start(&[("a.yaml", WEB)]);
    assert_eq!(bed.names().await, ["default/web"]);
    write(bed.directory.path(), "a.yaml", &WEB.replace("port: 80", "port: eighty"));
    write(bed.directory.path(), "b.yaml", &WEB.replace("name: web", "name: api"));
    assert_eq!(bed.names().await, ["default/web", "default/api"]);
    assert!(bed.stats.kind(ObjectKind::Service).failures(Cause::Manifest) >= 1);
    write(bed.directory.path(), "a.yaml", &WEB.replace("port: 80", "port: 81"));
    let (services, _) = bed.next().await;
    assert_eq!(services[0].ports[0].port.get(), 81);
}

#[tokio::test]
async fn the_first_file_wins_a_name_and_impossible_parts_are_counted() {
    let second = WEB.replace("10.96.0.10", "10.96.0.99").replace("port: 80", "port: 70000");
    let third = second.replace("name: web", "name: odd");
    let mut bed = start(&[("a.yaml", WEB), ("b.yaml", &second), ("c.yaml", &third)]);
    let (services, _) = bed.next().await;
    assert_eq!(services.len(), 2);
    assert_eq!(services[0].cluster_ips[0].to_string(), "10.96.0.10");
    assert_eq!(services[1].ports, []);
    assert_eq!(bed.stats.kind(ObjectKind::Service).complaints(Part::Port), 1);
}

#[tokio::test]
async fn the_own_node_is_taken_and_one_is_made_up_where_none_is_described() {
    let mut bed = start(&[("a.yaml", WEB)]);
    let (_, node) = bed.next().await;
    assert_eq!(node.expect("a Node").name, NodeName::new("node-a"));
    let described = "apiVersion: v1\nkind: Node\nmetadata: {name: NAME, labels: \
                     {topology.kubernetes.io/zone: z1}}\n";
    write(bed.directory.path(), "n.yaml", &described.replace("NAME", "node-b"));
    assert_eq!(bed.next().await.1.expect("a Node").zone, None);
    write(bed.directory.path(), "o.yaml", &described.replace("NAME", "node-a"));
    let node = bed.next().await.1.expect("a Node");
    assert_eq!(node.zone.map(|zone| zone.to_string()).as_deref(), Some("z1"));
}

#[test]
fn at_start_up_an_unparsable_file_or_a_missing_directory_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().expect("a directory");
    write(directory.path(), "a.yaml", &WEB.replace("port: 80", "port: eighty"));
    let open = |path: &Path| {
        let error = Manifests::open(path, NodeName::new("n"), Arc::default()).err();
        error.expect("an error").to_string()
    };
    let error = open(directory.path());
    assert!(error.contains("a.yaml:7:") && error.contains("spec.ports[0].port"), "{error}");
    let error = open(&directory.path().join("missing"));
    assert!(error.contains("missing") && error.contains("No such file"), "{error}");
}
