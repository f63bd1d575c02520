//! What was added to each file, and who holds the file.
//!
//! # What is one file
//! A file may have several nodes: the library has one for each mount in which it finds the file, and
//! a file that was made without a name has its own. Each of them, and each handle of one, keeps what
//! the file takes of the host. What was added stands with the node that it was added by; it comes back
//! when no node and no handle is left that may be of the same file.
//!
//! Nodes with different inode numbers are different files. Those with the same number may be files of
//! two file systems, which the ids of the file systems (`f_fsid` of statfs(2)) tell; they are asked
//! for only then, and where there is none the nodes are taken for one file.

use std::collections::HashMap;

/// The sum of what was added, and by which node.
#[derive(Debug, Default)]
pub struct Ledger {
    /// In bytes.
    used: u64,
    /// Inode numbers by node id.
    numbers: HashMap<u64, u64>,
    /// Nodes by inode number. None of the lists is empty.
    files: HashMap<u64, Vec<Node>>,
}

/// A node, as long as somebody holds it or something is to come back.
#[derive(Debug)]
struct Node {
    id: u64,
    /// The id of its file system, if another node has made it matter.
    file_system: Option<u64>,
    /// In bytes.
    added: u64,
    /// The guest can name it.
    known: bool,
    handles: u64,
    /// Its file had no name when it was last known, and so can't get one.
    gone: bool,
}

impl Node {
    fn is_held(&self) -> bool {
        self.known || self.handles > 0
    }

    fn may_be_the_file_of(&self, other: &Self) -> bool {
        match (self.file_system, other.file_system) {
            (Some(own), Some(others)) => own == others,
            _ => true,
        }
    }
}

impl Ledger {
    /// What has been added, in bytes.
    pub fn used(&self) -> u64 {
        self.used
    }

    fn node(&mut self, id: u64) -> Option<&mut Node> {
        let nodes = self.files.get_mut(self.numbers.get(&id)?)?;
        nodes.iter_mut().find(|node| node.id == id)
    }

    /// What the node has added that may come back, in bytes.
    pub fn added(&mut self, id: u64) -> u64 {
        self.node(id).map_or(0, |node| node.added)
    }

    /// The guest knows a node of a file with this inode number.
    pub fn known(&mut self, id: u64, number: u64, file_system: &dyn Fn(u64) -> Option<u64>) {
        if let Some(node) = self.node(id) {
            node.known = true;
            return;
        }
        self.numbers.insert(id, number);
        let nodes = self.files.entry(number).or_default();
        let node = Node { id, file_system: None, added: 0, known: true, handles: 0, gone: false };
        nodes.push(node);
        if nodes.len() > 1 {
            for node in nodes.iter_mut().filter(|node| node.known && node.file_system.is_none()) {
                node.file_system = file_system(node.id);
            }
        }
    }

    /// The guest can't name the node any more; `gone` says whether its file has no name.
    pub fn forgotten(&mut self, id: u64, gone: bool) {
        if let Some(node) = self.node(id) {
            node.known = false;
            node.gone = gone;
            self.settle(id);
        }
    }

    /// There is a handle of the node.
    pub fn opened(&mut self, id: u64) {
        if let Some(node) = self.node(id) {
            node.handles = node.handles.saturating_add(1);
        }
    }

    /// There is one handle less.
    pub fn closed(&mut self, id: u64) {
        if let Some(node) = self.node(id) {
            node.handles = node.handles.saturating_sub(1);
            self.settle(id);
        }
    }

    /// The node has added so many bytes.
    pub fn add(&mut self, id: u64, bytes: u64) {
        self.add_for_good(bytes);
        if let Some(node) = self.node(id) {
            node.added = node.added.saturating_add(bytes);
        }
    }

    /// So many bytes were added that don't come back.
    pub fn add_for_good(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    /// The node has freed so many bytes, which are given back as far as it has added them.
    pub fn give_back(&mut self, id: u64, bytes: u64) {
        let Some(node) = self.node(id) else { return };
        let bytes = bytes.min(node.added);
        node.added -= bytes;
        self.used = self.used.saturating_sub(bytes);
    }

    /// Removes what nobody holds of the nodes with this one's number, and gives back what was added to
    /// files that are gone for good.
    fn settle(&mut self, id: u64) {
        let Some(number) = self.numbers.get(&id).copied() else { return };
        let Some(nodes) = self.files.remove(&number) else { return };
        let (held, left): (Vec<_>, Vec<_>) = nodes.into_iter().partition(Node::is_held);
        let mut kept = Vec::new();
        for node in left {
            let may_come_back = node.gone && node.added > 0;
            if may_come_back && held.iter().any(|other| other.may_be_the_file_of(&node)) {
                kept.push(node);
                continue;
            }
            if may_come_back {
                self.used = self.used.saturating_sub(node.added);
            }
            self.numbers.remove(&node.id);
        }
        kept.extend(held);
        if !kept.is_empty() {
            self.files.insert(number, kept);
        }
    }

    /// The guest has forgotten everything; nothing that was added comes back any more.
    pub fn clear(&mut self) {
        self.numbers.clear();
        self.files.clear();
    }

    /// How many nodes are remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: u64 = 12;

    fn no_ids(_: u64) -> Option<u64> {
        None
    }

    #[test]
    fn a_file_comes_back_with_its_last_node_and_handle() {
        let mut ledger = Ledger::default();
        ledger.known(1, NUMBER, &no_ids);
        ledger.known(2, NUMBER, &no_ids);
        ledger.opened(2);
        ledger.add(1, 100);
        ledger.forgotten(1, true);
        assert_eq!(ledger.used(), 100);
        ledger.forgotten(2, true);
        assert_eq!(ledger.used(), 100);
        ledger.closed(2);
        assert_eq!((ledger.used(), ledger.len()), (0, 0));
    }

    #[test]
    fn a_file_of_another_file_system_keeps_nothing_back() {
        let mut ledger = Ledger::default();
        ledger.known(1, NUMBER, &Some);
        ledger.known(2, NUMBER, &Some);
        ledger.add(1, 100);
        ledger.add(2, 10);
        ledger.forgotten(1, true);
        assert_eq!((ledger.used(), ledger.len()), (10, 1));
        // The same file system, but with a name: nothing comes back.
        ledger.known(3, NUMBER, &|_| Some(2));
        ledger.add(3, 1);
        ledger.forgotten(2, true);
        ledger.forgotten(3, false);
        assert_eq!((ledger.used(), ledger.len()), (1, 0));
    }

    #[test]
    fn nodes_that_nobody_knows_take_no_part() {
        let mut ledger = Ledger::default();
        ledger.opened(1);
        ledger.closed(1);
        ledger.add(1, 100);
        ledger.give_back(1, 100);
        ledger.forgotten(1, true);
        assert_eq!((ledger.used(), ledger.len()), (100, 0));
    }

    #[test]
    fn each_node_gives_back_what_it_has_added() {
        let mut ledger = Ledger::default();
        ledger.known(1, NUMBER, &no_ids);
        ledger.known(2, NUMBER, &no_ids);
        ledger.add(1, 100);
        ledger.give_back(2, 100);
        assert_eq!(ledger.used(), 100);
        ledger.give_back(1, 1000);
        assert_eq!((ledger.used(), ledger.added(1)), (0, 0));
    }
}
