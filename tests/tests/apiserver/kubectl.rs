//! What an operator types, by the real `kubectl` over TLS with a token.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use proxy_tests::apiserver::{ApiServer, Options};
use serde_json::Value;

const WEB: &str = "apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  labels: {app: web}
spec:
  selector: {app: web}
  ports:
    - {name: http, port: 80, targetPort: 8080}
";

/// A server, and a home for kubectl with the way to it.
struct Stage {
    server: ApiServer,
    home: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let server = ApiServer::start(Options::default()).unwrap();
        let home = tempfile::tempdir().unwrap();
        server.write_kubeconfig(&home.path().join("kubeconfig"), None).unwrap();
        Self { server, home }
    }

    fn run(&self, arguments: &[&str], input: &str) -> Output {
        let program = std::env::var_os("PROXY_KUBECTL").unwrap_or_else(|| "kubectl".into());
        let mut child = Command::new(&program)
            .args(arguments)
            // Its caches go there; a proxy has no business here.
            .env("HOME", self.home.path())
            .env("KUBECONFIG", self.home.path().join("kubeconfig"))
            .env("NO_PROXY", "*")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{}: {error}: run `cargo xtask setup`", program.display())
            });
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str], input: &str) -> String {
        let output = self.run(arguments, input);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?}: {complaint}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments, "");
        assert!(!output.status.success(), "kubectl {arguments:?} succeeds");
        String::from_utf8(output.stderr).unwrap()
    }

    fn service(&self) -> Value {
        let text = self.succeeds(&["get", "service", "-n", "shop", "web", "-o", "json"], "");
        serde_json::from_str(&text).unwrap()
    }
}

#[test]
fn services_are_made_looked_at_changed_and_deleted() {
    let stage = Stage::new();
    let apply = ["apply", "--validate=false", "-f", "-"];
    // Asked for when an object is not found: the message then names what is missing.
    stage.succeeds(&["create", "namespace", "shop"], "");
    assert_eq!(stage.succeeds(&apply, WEB), "service/web created\n");
    let made = stage.service();
    assert!(made["spec"]["clusterIP"].as_str().is_some_and(|ip| ip.starts_with("10.")), "{made}");
    assert_eq!(made["spec"]["ports"][0]["targetPort"], 8080);

    let changed = WEB.replace("port: 80,", "port: 81,");
    assert_eq!(stage.succeeds(&apply, &changed), "service/web configured\n");
    assert_eq!(stage.service()["spec"]["ports"][0]["port"], 81);
    assert_eq!(stage.service()["spec"]["clusterIP"], made["spec"]["clusterIP"]);

    let note = "ipvs.node-dataplane/scheduler=mh";
    stage.succeeds(&["annotate", "service", "-n", "shop", "web", note], "");
    assert_eq!(stage.service()["metadata"]["annotations"]["ipvs.node-dataplane/scheduler"], "mh");
    let patch = r#"{"spec":{"internalTrafficPolicy":"Local"}}"#;
    stage.succeeds(&["patch", "service", "-n", "shop", "web", "-p", patch], "");
    assert_eq!(stage.service()["spec"]["internalTrafficPolicy"], "Local");

    let listed = stage.succeeds(&["get", "svc", "-A", "-l", "app=web", "-o", "name"], "");
    assert_eq!(listed, "service/web\n");
    stage.succeeds(&["delete", "service", "-n", "shop", "web", "--wait=false"], "");
    let gone = stage.fails(&["get", "service", "-n", "shop", "web"]);
    assert!(gone.contains("services \"web\" not found"), "{gone}");
}

#[test]
fn nodes_and_slices_are_listed_and_a_bad_service_is_told_why() {
    let stage = Stage::new();
    stage.server.store().load_generated(3, 2);
    let slices = stage.succeeds(&["get", "endpointslices", "-A", "-o", "name"], "");
    // One of each generated Service, beside the API server's own.
    assert_eq!(slices.lines().count(), 4, "{slices}");
    let none = stage.succeeds(&["get", "nodes", "-o", "name"], "");
    assert_eq!(none, "");
    let bad = WEB.replace("  ports:", "  clusterIP: 192.0.2.1\n  ports:");
    let output = stage.run(&["create", "--validate=false", "-f", "-"], &bad);
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && complaint.contains("valid range"), "{complaint}");
}
