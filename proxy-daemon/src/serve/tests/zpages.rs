//! The pages for people and debuggers.

use super::*;

impl Bed {
    async fn page(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let address = serve(http::metrics_router(Arc::clone(&self.status))).await;
        ask(address, method, path, headers, body).await
    }
}

const STATUSZ: &str = "Accept: application/json;as=Statusz;v=v1beta1;g=config.k8s.io\r\n";

#[tokio::test]
async fn statusz_tells_what_runs_and_since_when() {
    let bed = Bed::new();
    bed.at(3_723_000);
    let text = bed.page("GET", "/statusz", "Accept: text/plain\r\n", "").await;
    assert_eq!((text.code, text.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    let expected = format!(
        "\nproxy-daemon statusz\n\
         Warning: This endpoint is not meant to be machine parseable, has no formatting \
         compatibility guarantees and is for debugging purposes only.\n\n\
         Started: Sat Nov 21 09:00:00 UTC 2026\nUp: 1 hr 02 min 03 sec\n\
         Binary version: {}\nEmulation version: 1.36\n\
         Paths: /configz /flagz /healthz /metrics /metrics/slis /proxyMode\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(text.body, expected);
    let object = bed.page("GET", "/statusz", STATUSZ, "").await;
    assert_eq!(object.header("content-type"), Some("application/json"));
    let object = object.json();
    for (field, expected) in [
        ("kind", Value::from("Statusz")),
        ("apiVersion", "config.k8s.io/v1beta1".into()),
        ("startTime", "2026-11-21T09:00:00Z".into()),
        ("uptimeSeconds", 3_723.into()),
        ("emulationVersion", "1.36".into()),
    ] {
        assert_eq!(object[field], expected, "{field}");
    }
    // Each of the paths is there.
    for path in object["paths"].as_array().unwrap() {
        assert_eq!(bed.page("GET", path.as_str().unwrap(), "", "").await.code, 200, "{path}");
    }
    let refused = bed.page("GET", "/statusz", "Accept: application/json\r\n", "").await;
    assert_eq!(refused.code, 406);
}

#[tokio::test]
async fn flagz_has_every_flag_with_its_value_in_force() {
    let bed = Bed::with(&["--cluster-cidr=10.244.0.0/16"]);
    let text = bed.page("GET", "/flagz", "", "").await;
    assert!(text.body.starts_with("\nproxy-daemon flagz\nWarning: "), "{}", text.body);
    for line in ["cluster-cidr=10.244.0.0/16", "ipvs-scheduler=rr", "nodeport-addresses="] {
        assert!(text.body.lines().any(|held| held == line), "{line}: {}", text.body);
    }
    let accept = STATUSZ.replace("Statusz", "Flagz");
    let object = bed.page("GET", "/flagz", &accept, "").await.json();
    assert_eq!(
        (&object["kind"], &object["flags"]["v"]),
        (&Value::from("Flagz"), &Value::from("0"))
    );
}

#[tokio::test]
async fn service_level_indicators_count_checks_until_they_are_reset() {
    let mut bed = Bed::new();
    bed.queued(1_000, 2, 3);
    bed.synced(2_000, |_| {});
    for _ in 0..3 {
        bed.healthz().await;
    }
    bed.livez().await;
    let total = |kind: &str, status: &str, count: u32| {
        let labels = format!("name=\"proxy\",status=\"{status}\",type=\"{kind}\"");
        format!("kubernetes_healthchecks_total{{{labels}}} {count}\n")
    };
    let page = bed.page("GET", "/metrics/slis", "", "").await.body;
    for line in [
        "kubernetes_healthcheck{name=\"proxy\",type=\"healthz\"} 1\n".to_owned(),
        total("healthz", "success", 3),
        total("healthz", "error", 0),
        total("livez", "success", 1),
    ] {
        assert!(page.contains(&line), "{line}{page}");
    }
    assert_eq!(bed.page("DELETE", "/metrics/slis", "", "").await.body, "metrics reset\n");
    let page = bed.page("GET", "/metrics/slis", "", "").await.body;
    assert!(page.contains(&total("healthz", "success", 0)), "{page}");
    bed.queued(3_000, 1, 0);
    bed.at(120_000);
    bed.healthz().await;
    let page = bed.page("GET", "/metrics/slis", "", "").await.body;
    for line in [
        "kubernetes_healthcheck{name=\"proxy\",type=\"livez\"} 0\n".to_owned(),
        total("healthz", "success", 0),
        total("healthz", "error", 1),
    ] {
        assert!(page.contains(&line), "{line}{page}");
    }
}

#[tokio::test]
async fn debugging_is_served_with_profiling_only() {
    let plain = Bed::new();
    for path in ["/debug/flags/v", "/debug/pprof/"] {
        assert_eq!(plain.page("PUT", path, "", "4").await.code, 404, "{path}");
    }
    let bed = Bed::with(&["--profiling"]);
    for path in ["/debug/pprof/", "/debug/pprof/heap"] {
        let reply = bed.page("GET", path, "", "").await;
        assert_eq!(reply.code, 501, "{path}");
        assert!(reply.body.contains("no Go runtime"), "{}", reply.body);
    }
    let heard = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&heard);
    bed.status.log_through(move |verbosity| {
        told.lock().unwrap().push(verbosity);
        verbosity < 9
    });
    let reply = bed.page("PUT", "/debug/flags/v", "", "4").await;
    assert_eq!(reply.code, 200);
    assert_eq!(reply.body, "successfully set klog.logging.verbosity to 4");
    for (method, body, code) in [("PUT", "9", 409), ("PUT", "x", 400), ("GET", "", 406)] {
        assert_eq!(
            bed.page(method, "/debug/flags/v", "", body).await.code,
            code,
            "{method} {body}"
        );
    }
    assert_eq!(*heard.lock().unwrap(), [4, 9]);
    assert_eq!(bed.page("GET", "/healthz/ping", "", "").await.body, "ok");
}
