//! The proxies before the nodes of a cluster that is planned, and who goes through which.

use std::net::{Ipv4Addr, SocketAddr};

use pgherd::cli::demo::cluster::{NodePlan, Plan};

use super::proxy::Proxy;

/// One for each etcd member before each node.
pub fn proxy_etcd(plan: &mut Plan) -> Vec<Vec<Proxy>> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut proxies = Vec::new();
    for node in &mut plan.nodes {
        let own: Vec<Proxy> = plan.etcd.iter().map(|member| Proxy::start(any, (Ipv4Addr::LOCALHOST, member.client_port).into())).collect();
        node.endpoints = own.iter().map(|proxy| format!("http://{}", proxy.address())).collect();
        proxies.push(own);
    }
    proxies
}

/// Declares each node under an address of its own, where a proxy listens on the ports that the node itself has on 127.0.0.1.
pub fn proxy_nodes(plan: &mut Plan) -> Vec<[Proxy; 2]> {
    let proxied = |(index, node): (usize, &mut NodePlan)| {
        let address = Ipv4Addr::new(127, 0, 1, u8::try_from(index).unwrap() + 1);
        node.declared.address = address.to_string();
        [node.declared.port, node.declared.api_port].map(|port| Proxy::start((address, port).into(), (Ipv4Addr::LOCALHOST, port).into()))
    };
    plan.nodes.iter_mut().enumerate().map(proxied).collect()
}
