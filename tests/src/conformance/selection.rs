//! Which objects count, and which parts of them.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::context::Context;
use super::look::{from, who};
use super::service::{Front, Service, endpoint};
use super::{Case, case};

pub(super) const CASES: &[Case] = &[
    case("headless and service-proxy-name labels make a Service somebody else's", labels),
    case("no cluster IP and ExternalName program nothing", without_cluster_ip),
    case("only labelled slices of the namespace count, and no FQDN ones", which_slices),
    case("slices merge; an endpoint in many counts once; one not terminating wins", merged),
    case("impossible ports cost only themselves", impossible_ports),
    case("no address: skipped; many addresses: the first counts", addresses_of_an_endpoint),
    case("unset conditions: ready, serving, not terminating", unset_conditions),
    case("addresses that can be no endpoint are left out", impossible_addresses),
    case("a broken object costs no other its programming", broken_objects),
    case("a slice serves its own family only", families),
];

const CLIENT: &[&str] = &["a3"];

fn labels(cx: &mut Context<'_>) -> Result<()> {
    let control = cx.service("control", &[]).endpoints(&["a0"]);
    let labelled = |cx: &mut Context<'_>, name: &str, label: &str| {
        let change = json!({"metadata": {"labels": {label: "other"}}});
        cx.service(name, &[]).endpoints(&["a0"]).with(&change)
    };
    let headless = labelled(cx, "headless", "service.kubernetes.io/headless");
    let foreign = labelled(cx, "foreign", "service.kubernetes.io/service-proxy-name");
    cx.program(&[&control, &headless, &foreign])?;
    cx.look(&[
        from(CLIENT).to(&control.at(Front::Cluster)).answers(&["a0"]),
        from(CLIENT).to(&headless.at(Front::Cluster)).nobody(),
        from(CLIENT).to(&foreign.at(Front::Cluster)).nobody(),
    ])?;
    // A label that comes takes the Service away, and one that goes gives it back.
    let taken = control
        .clone()
        .with(&json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}}));
    let given = foreign.clone().with(&json!({"metadata": {"labels": null}}));
    cx.program(&[&taken, &given])?;
    // Slices of headless Services carry that label themselves.
    let mut slices = control.slices(cx.cluster())?;
    for slice in &mut slices {
        slice["metadata"]["name"] = json!("headless-slice");
        slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!("foreign");
        slice["endpoints"] = json!([endpoint(cx.cluster(), "b0", slice["addressType"] == "IPv6")?]);
    }
    slices.truncate(1);
    slices.into_iter().try_for_each(|slice| cx.apply_object(slice))?;
    cx.settle()?;
    cx.look(&[
        from(CLIENT).to(&taken.at(Front::Cluster)).nobody(),
        from(CLIENT).to(&given.at(Front::Cluster)).answers(&["a0"]),
    ])
}

fn without_cluster_ip(cx: &mut Context<'_>) -> Result<()> {
    let fronts = &[Front::External];
    let good = cx.service("good", fronts).endpoints(&["a0"]);
    let none = cx.service("none", fronts).endpoints(&["a0"]);
    let none = none.spec(&json!({"clusterIP": "None", "clusterIPs": ["None"]}));
    let external_name = cx.service("external-name", fronts).endpoints(&["a0"]).spec(&json!({
        "type": "ExternalName", "externalName": "example.com", "clusterIP": null,
        "clusterIPs": null, "ipFamilies": null, "ipFamilyPolicy": null,
    }));
    cx.program(&[&good, &none, &external_name])?;
    cx.look(&[
        from(&["a3", "outside"]).to(&good.at(Front::External)).answers(&["a0"]),
        from(&["a3", "outside"]).to(&none.at(Front::External)).nobody(),
        from(&["a3", "outside"]).to(&external_name.at(Front::External)).nobody(),
    ])
}

fn which_slices(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0"]);
    let other = cx.service("other", &[]);
    cx.apply(&web)?;
    for v6 in [false, true] {
        if (v6 && !cx.has_v6()) || (!v6 && !cx.has_v4()) {
            continue;
        }
        let mut unlabelled = web.slice(cx.cluster(), &format!("web-bare-{v6}"), v6, &["a1"])?;
        unlabelled["metadata"]["labels"] = json!({});
        let mut others = web.slice(cx.cluster(), &format!("web-others-{v6}"), v6, &["a2"])?;
        others["metadata"]["labels"]["kubernetes.io/service-name"] = json!("other");
        let mut name = web.slice(cx.cluster(), &format!("web-name-{v6}"), v6, &["b0"])?;
        name["addressType"] = json!("FQDN");
        let mut elsewhere = web.slice(cx.cluster(), &format!("web-far-{v6}"), v6, &["b1"])?;
        elsewhere["metadata"]["namespace"] = json!("elsewhere");
        for slice in [unlabelled, others, name] {
            cx.apply_object(slice)?;
        }
        cx.bed.apply(elsewhere)?;
    }
    cx.program(&[&other])?;
    cx.look(&[
        from(CLIENT).to(&web.at(Front::Cluster)).answers(&["a0"]),
        from(CLIENT).to(&other.at(Front::Cluster)).answers(&["a2"]),
    ])
}

fn merged(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]);
    cx.apply_object(web.object())?;
    let slices: &[(&str, &[&str])] = &[
        ("s1", &["a0", "a1"]),
        ("s2", &["a0", "b1 terminating"]),
        ("s3", &["a0", "b1"]),
        ("s4", &["a0", "b1 terminating"]),
    ];
    for v6 in [false, true] {
        if !web.cluster_ips.iter().any(|ip| ip.is_ipv6() == v6) {
            continue;
        }
        for (name, endpoints) in slices {
            let name = format!("{name}-{v6}");
            let slice = web.slice(cx.cluster(), &name, v6, endpoints)?;
            cx.apply_object(slice)?;
        }
        // A slice may give the port another number.
        let mut moved = web.slice(cx.cluster(), &format!("s5-{v6}"), v6, &["b2"])?;
        for port in moved["ports"].as_array_mut().into_iter().flatten() {
            port["port"] = json!(super::SECOND_TARGET_PORT);
        }
        cx.apply_object(moved)?;
    }
    cx.settle()?;
    let targets = web.at(Front::Cluster);
    cx.look(&[from(CLIENT).to(&targets).answers(&["a0", "a1", "b1", "b2:8081"])])?;
    for target in targets {
        let by_server = who(cx.cluster(), "a3", target, 40)?;
        let most = by_server.get("a0").copied().unwrap_or(0);
        // A quarter, or more than half if each copy counted.
        ensure!(most < 20, "{target:?}: a0 has {most} of 40 connections: {by_server:?}");
    }
    Ok(())
}

/// Changes every slice of `service` by `change` and applies them.
fn apply_changed(
    cx: &mut Context<'_>,
    service: &Service,
    change: impl Fn(&mut Value),
) -> Result<()> {
    for mut slice in service.slices(cx.cluster())? {
        change(&mut slice);
        cx.apply_object(slice)?;
    }
    Ok(())
}

fn impossible_ports(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).second_ports().endpoints(&["a0"]);
    let good = cx.service("good", &[]).endpoints(&["b0"]);
    for bad in [json!(null), json!(0), json!(70000), json!(-1)] {
        cx.apply_object(web.object())?;
        apply_changed(cx, &web, |slice| {
            for port in slice["ports"].as_array_mut().into_iter().flatten() {
                if port["port"] == json!(super::SECOND_TARGET_PORT) {
                    port["port"] = bad.clone();
                }
            }
        })?;
    }
    cx.program(&[&good])?;
    let (first, second): (Vec<_>, Vec<_>) =
        web.at(Front::Cluster).into_iter().partition(|(_, address)| address.port() == 80);
    cx.look(&[
        from(CLIENT).to(&first).answers(&["a0"]),
        from(CLIENT).to(&super::look::refusable(&second)).refused(),
        from(CLIENT).to(&good.at(Front::Cluster)).answers(&["b0"]),
    ])?;
    cx.program(&[&web])?;
    cx.look(&[from(CLIENT).to(&second).answers(&["a0:8081"])])
}

fn addresses_of_an_endpoint(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "a1", "b0"]);
    cx.apply_object(web.object())?;
    let second = |v6: bool| -> Result<Value> {
        Ok(endpoint(cx.cluster(), "b2", v6)?["addresses"][0].clone())
    };
    let seconds = [second(false)?, second(true)?];
    apply_changed(cx, &web, |slice| {
        let v6 = slice["addressType"] == "IPv6";
        slice["endpoints"][0]["addresses"] = json!([]);
        if let Some(list) = slice["endpoints"][1]["addresses"].as_array_mut() {
            list.push(seconds[usize::from(v6)].clone());
        }
    })?;
    cx.settle()?;
    cx.look(&[from(CLIENT).to(&web.at(Front::Cluster)).answers(&["a1", "b0"])])
}

fn unset_conditions(cx: &mut Context<'_>) -> Result<()> {
    let ready = cx.service("ready", &[]).endpoints(&["a0 nil", "b0"]);
    let serving = cx.service("serving", &[]).endpoints(&["a0 terminating-nil"]);
    let live = cx.service("live", &[]).endpoints(&["a0 serving-nil"]);
    cx.program(&[&ready, &serving, &live])?;
    cx.look(&[
        from(CLIENT).to(&ready.at(Front::Cluster)).answers(&["a0", "b0"]),
        from(CLIENT).to(&serving.at(Front::Cluster)).answers(&["a0"]),
        from(CLIENT).to(&super::look::refusable(&live.at(Front::Cluster))).refused(),
    ])
}

fn impossible_addresses(cx: &mut Context<'_>) -> Result<()> {
    const BAD: [&[&str]; 2] = [
        &["0.0.0.0", "127.0.0.1", "169.254.0.9", "224.0.0.1"],
        &["::", "::1", "fe80::9", "ff02::1"],
    ];
    let web = cx.service("web", &[]).endpoints(&["a0"]);
    cx.apply_object(web.object())?;
    let before = cx.metric(0, "node_dataplane_rejected_parts_total")?;
    apply_changed(cx, &web, |slice| {
        let v6 = slice["addressType"] == "IPv6";
        if let Some(list) = slice["endpoints"].as_array_mut() {
            for address in BAD[usize::from(v6)] {
                list.push(json!({"addresses": [address], "conditions": {"ready": true}}));
            }
        }
    })?;
    cx.settle()?;
    let targets = web.at(Front::Cluster);
    cx.look(&[from(&["a3", "node-a"]).to(&targets).answers(&["a0"])])?;
    for target in targets {
        who(cx.cluster(), "a3", target, 10)?;
    }
    let counted = cx.metric(0, "node_dataplane_rejected_parts_total")? - before;
    ensure!(counted >= 4.0, "{counted} rejected addresses are counted");
    Ok(())
}

fn broken_objects(cx: &mut Context<'_>) -> Result<()> {
    let before = cx.service("before", &[]).endpoints(&["a0"]);
    let after = cx.service("after", &[]).endpoints(&["b0"]);
    let broken = cx.service("broken", &[]).endpoints(&["a1"]);
    cx.program(&[&before, &broken])?;
    cx.look(&[from(CLIENT).to(&broken.at(Front::Cluster)).answers(&["a1"])])?;
    // Of types that the API does not have: such objects come from elsewhere than a correct
    // server, and the last good version is kept.
    apply_changed(cx, &broken, |slice| slice["endpoints"] = json!("everywhere"))?;
    cx.program(&[&after])?;
    let changed = before.clone().endpoints(&["b1"]);
    cx.program(&[&changed])?;
    cx.look(&[
        from(CLIENT).to(&after.at(Front::Cluster)).answers(&["b0"]),
        from(CLIENT).to(&changed.at(Front::Cluster)).answers(&["b1"]),
        from(CLIENT).to(&broken.at(Front::Cluster)).answers(&["a1"]),
    ])
}

fn families(cx: &mut Context<'_>) -> Result<()> {
    // With one family a slice of the other is noise; with two it is tempting.
    let mut web = cx.service("web", &[Front::External]).endpoints(&["a0"]);
    let all = web.clone();
    web.cluster_ips.truncate(1);
    cx.apply_object(web.object())?;
    for slice in all.slices(cx.cluster())? {
        cx.apply_object(slice)?;
    }
    let v6 = web.cluster_ips.iter().any(std::net::IpAddr::is_ipv6);
    let mut wrong = web.slice(cx.cluster(), "web-wrong", v6, &["b0"])?;
    wrong["addressType"] = json!(if v6 { "IPv4" } else { "IPv6" });
    cx.apply_object(wrong)?;
    cx.settle()?;
    let (own, other): (Vec<_>, Vec<_>) =
        web.everywhere().into_iter().partition(|(_, address)| address.is_ipv6() == v6);
    let mut looks = vec![from(CLIENT).to(&own).answers(&["a0"])];
    if !other.is_empty() {
        looks.push(from(CLIENT).to(&other).nobody());
    }
    cx.look(&looks)
}
