//! etcd: keys, fenced transactions, the lease, the watch.
