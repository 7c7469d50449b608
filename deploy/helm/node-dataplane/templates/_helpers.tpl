{{- define "node-dataplane.labels" -}}
app.kubernetes.io/name: node-dataplane
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "node-dataplane.selector" -}}
app.kubernetes.io/name: node-dataplane
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "node-dataplane.account" -}}
{{- default .Release.Name .Values.serviceAccount.name }}
{{- end }}

{{- define "node-dataplane.configuration" -}}
{{- $own := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" "mode" .Values.mode "clusterCIDR" .Values.clusterCIDR -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $own) }}
{{- end }}

{{- define "node-dataplane.capabilities" -}}
{{- $needed := list "NET_ADMIN" -}}
{{- if eq .Values.mode "ebpf" -}}
{{- $needed = list "NET_ADMIN" "BPF" "PERFMON" "SYS_ADMIN" "SYS_PTRACE" -}}
{{- end -}}
{{- toYaml (default $needed .Values.capabilities) }}
{{- end }}

{{- define "node-dataplane.own-configuration" -}}
{{- $own := dict "apiVersion" "node-dataplane/v1alpha1" "kind" "NodeDataplaneConfiguration" "mode" .Values.mode "sysctlRoot" "/host/proc/sys" -}}
{{- if eq .Values.mode "ebpf" -}}
{{- $_ := set $own "cgroupRoot" "/host/sys/fs/cgroup" -}}
{{- end -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.dataplaneConfig) $own) }}
{{- end }}
