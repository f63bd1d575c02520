//! What the pods of a cluster have in their `securityContext`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use super::messages::{Capability, Int64Value, SecurityProfile};
use super::node::{Node, Pod, VOLUME};
use crate::stage::on_stage;

/// What a container that was changed writes.
fn output(
    pod: &Pod<'_>,
    name: &str,
    script: &str,
    change: impl FnOnce(&mut super::messages::LinuxContainerSecurityContext),
) -> String {
    let mut config = pod.container(name, script);
    change(config.security());
    let (code, log) = pod.output(config);
    assert_eq!(code, 0, "{log}");
    log
}

#[test]
fn containers_have_the_users_the_groups_and_the_rights_that_were_asked_for() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let mut config = node.pod_config();
        let linux = config.linux.as_mut().expect("linux");
        linux.sysctls =
            [("net.ipv4.ip_unprivileged_port_start", "80"), ("kernel.shm_rmid_forced", "1")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into();
        let pod = node.run(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        // A volume of a pod with an fsGroup.
        let shared = Path::new(VOLUME).join("shared");
        fs::create_dir(&shared).expect("directory");
        chown(&shared, None, Some(3000)).expect("group");
        fs::set_permissions(&shared, Permissions::from_mode(0o2770)).expect("mode");
        let script = "id; echo x > /volume/shared/file; nc -l -p 80 &
            until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':0050 '; do
                kill -0 $! || exit 1
                sleep 0.1
            done; echo bound; kill $!
            cat /proc/sys/kernel/shm_rmid_forced; grep -E '^(Cap(Eff|Bnd)|NoNewPrivs)' /proc/self/status";
        let found = output(&pod, "user", script, |security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 2000 });
            security.supplemental_groups = vec![3000];
            security.no_new_privs = true;
            security.capabilities = Some(Capability {
                add_capabilities: Vec::new(),
                drop_capabilities: vec!["ALL".to_owned()],
            });
        });
        let none = "0000000000000000";
        let expected = format!(
            "uid=1000(builder) gid=2000(extra) groups=2000(extra),3000\nbound\n1\n\
             CapEff:\t{none}\nCapBnd:\t{none}\nNoNewPrivs:\t1\n"
        );
        assert_eq!(found, expected);
        assert_eq!(fs::metadata(shared.join("file")).expect("file").gid(), 3000);

        let script = "grep CapEff /proc/self/status";
        let found = output(&pod, "added", script, |security| {
            security.capabilities = Some(Capability {
                add_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
                drop_capabilities: vec!["ALL".to_owned()],
            });
        });
        assert_eq!(found, "CapEff:\t0000000000000400\n");

        let script = "exec 2>&1; touch /x || echo refused; touch /volume/y && echo written
            grep Seccomp: /proc/self/status; ls /sys/firmware | wc -l; wc -c < /proc/timer_list
            echo 1 > /proc/sys/kernel/shm_rmid_forced || echo read-only";
        let found = output(&pod, "confined", script, |security| security.readonly_rootfs = true);
        let expected = "touch: /x: Read-only file system\nrefused\nwritten\nSeccomp:\t2\n0\n0\n\
                        sh: can't create /proc/sys/kernel/shm_rmid_forced: Read-only file system\n\
                        read-only\n";
        assert_eq!(found, expected);
        let script = "touch /x && echo written; grep Seccomp: /proc/self/status";
        let found = output(&pod, "open", script, |security| {
            security.seccomp = Some(SecurityProfile::UNCONFINED);
        });
        assert_eq!(found, "written\nSeccomp:\t0\n");
        pod.remove();
    });
}

#[test]
fn privileged_container_is_root_of_its_guest_only() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let mut config = node.pod_config();
        let linux = config.linux.as_mut().expect("linux");
        linux.security_context.as_mut().expect("security").privileged = true;
        let pod = node.run(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        let script =
            "mkdir /mnt && mount -t tmpfs none /mnt && echo mounted; ls /dev | grep -v std";
        let found = output(&pod, "privileged", script, |security| {
            security.privileged = true;
            security.seccomp = None;
            security.masked_paths.clear();
            security.readonly_paths.clear();
        });
        let devices = "core fd full mqueue null ptmx pts random shm tty urandom zero";
        assert_eq!(found, format!("mounted\n{}\n", devices.replace(' ', "\n")));
        pod.remove();
    });
}
