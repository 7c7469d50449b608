//! Health-check node ports, over real sockets.

use std::net::IpAddr;

use super::*;

#[tokio::test]
async fn health_check_node_port_follows_the_endpoints() {
    let mut bed = Bed::with(&[]);
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let serving = Serving { healthz: None, metrics: None, hard_fail: false, profiling: false };
    tokio::spawn(run(Arc::clone(&bed.status), serving));
    let web = ObjectName::new("shop", "web");

    bed.observer.health_check(
        &web,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(1), v6: Some(3) } }),
    );
    until(async || TcpStream::connect(address).await.is_ok()).await;
    let reply = get(address, "/any/path", "").await;
    assert_eq!(reply.code, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(reply.header("x-load-balancing-endpoint-weight"), Some("1"));
    assert_eq!(
        reply.body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
         \t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"
    );

    bed.observer.health_check(
        &web,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(0), v6: Some(3) } }),
    );
    until(async || get(address, "/", "").await.code == 503).await;
    let over_v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    assert_eq!(get(over_v6, "/", "").await.json()["localEndpoints"], 3, "of that family");
    assert_eq!(get(address, "/", "").await.json()["localEndpoints"], 0);

    // The port passes to another Service; the proxy falls behind.
    bed.observer.health_check(&web, None);
    let other = ObjectName::new("shop", "other");
    bed.observer.health_check(
        &other,
        Some(HealthCheck { port, local_endpoints: LocalReady { v4: Some(2), v6: Some(3) } }),
    );
    until(async || {
        TcpStream::connect(address).await.is_ok()
            && get(address, "/", "").await.json()["service"]["name"] == "other"
    })
    .await;
    bed.queued(0, 1, 0);
    bed.at(60_000);
    let reply = get(address, "/", "").await;
    assert_eq!((reply.code, &reply.json()["serviceProxyHealthy"]), (503, &Value::Bool(false)));

    bed.observer.health_check(&other, None);
    until(async || TcpStream::connect(address).await.is_err()).await;
}

#[tokio::test]
async fn health_check_node_ports_listen_where_node_ports_do() {
    let mut bed = Bed::with(&["--nodeport-addresses=127.0.0.0/8"]);
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let serving = Serving { healthz: None, metrics: None, hard_fail: false, profiling: false };
    tokio::spawn(run(Arc::clone(&bed.status), serving));
    let [first, second, third]: [IpAddr; 3] =
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"].map(|ip| ip.parse().unwrap());
    let answers = async |ip: IpAddr| TcpStream::connect(SocketAddr::new(ip, port)).await.is_ok();
    let local_endpoints = LocalReady { v4: Some(1), v6: None };
    let check = Some(HealthCheck { port, local_endpoints });
    bed.observer.health_check(&ObjectName::new("shop", "web"), check);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!answers(first).await, "nobody has said where");
    let link_local = "fe80::1".parse().unwrap();
    bed.observer.node_port_addresses(&[first, second, link_local]);
    until(async || answers(first).await && answers(second).await).await;
    assert!(!answers(third).await, "not among them");
    let stays = TcpStream::connect(SocketAddr::new(second, port)).await.unwrap();

    // The node's addresses change; a listener whose address stays is not begun anew.
    bed.observer.node_port_addresses(&[second, third]);
    until(async || answers(third).await && !answers(first).await).await;
    let mut stays = stays;
    stays.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stays.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");

    bed.observer.node_port_addresses(&[]);
    until(async || !answers(second).await && !answers(third).await).await;
}

#[tokio::test]
async fn all_addresses_stay_all_addresses_whatever_they_are() {
    let mut bed = Bed::with(&[]);
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let serving = Serving { healthz: None, metrics: None, hard_fail: false, profiling: false };
    tokio::spawn(run(Arc::clone(&bed.status), serving));
    bed.observer.node_port_addresses(&[[192, 0, 2, 1].into()]);
    let local_endpoints = LocalReady { v4: Some(1), v6: None };
    let check = Some(HealthCheck { port, local_endpoints });
    bed.observer.health_check(&ObjectName::new("shop", "web"), check);
    for ip in ["127.0.0.1", "127.0.0.2", "::1"] {
        let address = SocketAddr::new(ip.parse().unwrap(), port);
        until(async || TcpStream::connect(address).await.is_ok()).await;
    }
}
