# Where this machine's apt gets its packages from, for the demo's scripts (sourced by bash). Nothing
# about the archive is written down in this repository: mirror, keys and proxy are the host's own.

# The archive's repositories as apt is configured, one a line: URI|suite|component|keyring.
# The keyring is empty where apt's own trusted keys are to be used.
archive_repositories() {
  apt-get indextargets --format '$(REPO_URI)|$(CODENAME)|$(COMPONENT)|$(SIGNED_BY)' 'Created-By: Packages' |
    sed 's/|[^|/][^|]*$/|/' | awk '!seen[$0]++'
}

# The code name of the running distribution: `bookworm`.
archive_codename() {
  (. /etc/os-release && echo "$VERSION_CODENAME")
}

# Changes when the archive's release of SUITE does, as far as this machine's apt has heard.
archive_state() {
  local lists file
  eval "$(apt-config shell lists Dir::State::lists/d)"
  for file in "${lists:-/var/lib/apt/lists/}"*_dists_"$1"_{In,}Release; do
    [ ! -f "$file" ] || sha256sum <"$file"
  done
}

# Lets programs other than apt use the proxy that apt uses.
archive_use_proxy() {
  local proxy=''
  eval "$(apt-config shell proxy Acquire::http::Proxy)"
  [[ -z $proxy || $proxy == DIRECT ]] || export http_proxy=$proxy
  proxy=''
  eval "$(apt-config shell proxy Acquire::https::Proxy)"
  [[ -z $proxy || $proxy == DIRECT ]] || export https_proxy=$proxy
}
